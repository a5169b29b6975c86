//! Unpacks Debian packages: an `ar` archive whose member `data.tar.*` holds the files.
//!
//! [`unpack`] puts the regular files into a folder and returns the list of everything that was in the archive. No
//! maintainer script is read, let alone run; owners and times are dropped. A package was verified before it comes
//! here ([`crate::packages`]), but mangled bytes give an error all the same and never a file outside of the folder.
//!
//! Source: deb(5); dpkg, lib/dpkg/ar.c.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::tree::hex;

/// Entries of one package at most; the kernel's has about 6,000.
pub const ENTRIES_MAX: usize = 100_000;
/// Unpacked bytes of one package at most.
pub const UNPACKED_MAX: u64 = 4 << 30;

/// Why a package could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DebError {
    #[error("could not read the archive")]
    Read(#[source] io::Error),
    #[error("could not write `{path}`")]
    Write { path: String, source: io::Error },
    /// No `debian-binary` of format 2 at the start.
    #[error("not a Debian package of format 2")]
    Format,
    /// There is no `data.tar`, or one that is compressed in a way that we do not know.
    #[error("the package has no `data.tar` in xz, zstd, gzip or plain form")]
    NoData,
    /// A path that leaves the folder, or no text.
    #[error("the package has an entry with the path `{0}`")]
    Path(String),
    #[error("the package is too large: {0}")]
    TooLarge(&'static str),
}

/// One entry of a package, without its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Permission bits as packed.
    pub mode: u32,
    pub kind: Kind,
}

/// What an entry is. Device nodes do not occur in packages and are dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Folder,
    File { size: u64, sha256: String },
    Link(String),
}

/// Unpacks the regular files of a package that `wanted` asks for (by path without `./`) into `folder`, under their
/// own paths, and returns all entries that it asks for.
///
/// # Errors
///
/// See [`DebError`]; `folder` may then hold some of the files.
pub fn unpack(
    package: &Path,
    folder: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, Item>, DebError> {
    let file = File::open(package).map_err(DebError::Read)?;
    let mut archive = ar::Archive::new(BufReader::new(file));
    let mut first = true;
    while let Some(member) = archive.next_entry() {
        let mut member = member.map_err(DebError::Read)?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        // dpkg writes no slash after a name, other archivers do.
        let name = name.trim_end_matches('/');
        if std::mem::take(&mut first) {
            let mut version = String::new();
            let text = (&mut member).take(16).read_to_string(&mut version);
            if name != "debian-binary" || text.is_err() || !version.starts_with("2.") {
                return Err(DebError::Format);
            }
            continue;
        }
        let data: Box<dyn Read + '_> = match name {
            "data.tar" => Box::new(member),
            "data.tar.xz" => Box::new(liblzma::read::XzDecoder::new(member)),
            "data.tar.gz" => Box::new(flate2::read::GzDecoder::new(member)),
            "data.tar.zst" => {
                Box::new(zstd::stream::read::Decoder::new(member).map_err(DebError::Read)?)
            }
            _ => continue,
        };
        return unpack_tar(data, folder, wanted);
    }
    Err(if first { DebError::Format } else { DebError::NoData })
}

fn unpack_tar(
    data: impl Read,
    folder: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, Item>, DebError> {
    let mut items = BTreeMap::new();
    let mut left = UNPACKED_MAX;
    let mut archive = tar::Archive::new(data);
    for entry in archive.entries().map_err(DebError::Read)? {
        let mut entry = entry.map_err(DebError::Read)?;
        let path = clean(&entry.path_bytes())?;
        if path.is_empty() || !wanted(&path) {
            continue;
        }
        if items.len() == ENTRIES_MAX {
            return Err(DebError::TooLarge("entries"));
        }
        let mode = entry.header().mode().map_err(DebError::Read)? & 0o7777;
        let kind = match entry.header().entry_type() {
            tar::EntryType::Directory => Kind::Folder,
            tar::EntryType::Symlink => Kind::Link(link_target(&entry)?),
            tar::EntryType::Link => {
                // The first name was unpacked before: one file with two names becomes two entries.
                let first = clean(link_target(&entry)?.as_bytes())?;
                let Some(Item { kind: kind @ Kind::File { .. }, .. }) = items.get(&first) else {
                    return Err(DebError::Path(path));
                };
                let kind = kind.clone();
                let written = (|| {
                    make_parent(&folder.join(&path))?;
                    fs::copy(folder.join(&first), folder.join(&path))
                })();
                written.map_err(|source| DebError::Write { path: path.clone(), source })?;
                kind
            }
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                let size = entry.header().size().map_err(DebError::Read)?;
                left = left.checked_sub(size).ok_or(DebError::TooLarge("unpacked bytes"))?;
                write_file(&mut entry, &folder.join(&path), &path)?
            }
            _ => continue,
        };
        items.insert(path, Item { mode, kind });
    }
    Ok(items)
}

/// The path without `./` at its start and `/` at its end; nothing that leads elsewhere.
fn clean(path: &[u8]) -> Result<String, DebError> {
    let bad = || DebError::Path(String::from_utf8_lossy(path).into_owned());
    let text = std::str::from_utf8(path).map_err(|_| bad())?;
    let text = text.strip_prefix("./").unwrap_or(text);
    let text = text.strip_suffix('/').unwrap_or(text);
    if text.is_empty() || text == "." {
        return Ok(String::new());
    }
    let sound = |piece: &str| !matches!(piece, "" | "." | "..") && !piece.contains('\0');
    if text.split('/').all(sound) { Ok(text.to_owned()) } else { Err(bad()) }
}

fn link_target<R: Read>(entry: &tar::Entry<'_, R>) -> Result<String, DebError> {
    let target = entry.link_name_bytes().unwrap_or_default();
    match std::str::from_utf8(&target) {
        Ok(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(DebError::Path(String::from_utf8_lossy(&target).into_owned())),
    }
}

fn make_parent(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path.parent().expect("a path inside of a folder has a parent"))
}

fn write_file(data: &mut impl Read, to: &Path, path: &str) -> Result<Kind, DebError> {
    let failed = |source| DebError::Write { path: path.to_owned(), source };
    make_parent(to).map_err(failed)?;
    // Never through a link: an entry of the archive could have put one there.
    let mut file = File::create_new(to).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut size = 0;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = data.read(&mut buffer).map_err(DebError::Read)?;
        if read == 0 {
            return Ok(Kind::File { size, sha256: hex(&hash.finalize()) });
        }
        size += read as u64;
        hash.update(&buffer[..read]);
        file.write_all(&buffer[..read]).map_err(failed)?;
    }
}

/// Packages made up for tests, here and in other modules.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// How `data.tar` is packed.
    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Packing {
        Plain,
        Xz,
        Gzip,
        Zstd,
    }

    /// One entry of a made-up package: path, mode, and content; a content `-> x` is a link to `x`.
    pub(crate) type Made<'a> = (&'a str, u32, &'a [u8]);

    /// The bytes of a package.
    pub(crate) fn package(entries: &[Made<'_>], packing: Packing) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, mode, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(*mode);
            header.set_size(0);
            let path = format!("./{path}");
            if let Some(target) = content.strip_prefix(b"-> ") {
                header.set_entry_type(tar::EntryType::Symlink);
                let target = std::str::from_utf8(target).unwrap();
                archive.append_link(&mut header, path, target).unwrap();
            } else {
                header.set_size(content.len() as u64);
                archive.append_data(&mut header, path, *content).unwrap();
            }
        }
        deb(&archive.into_inner().unwrap(), packing)
    }

    /// A package around a `data.tar`.
    pub(crate) fn deb(tar: &[u8], packing: Packing) -> Vec<u8> {
        let (name, data) = match packing {
            Packing::Plain => ("data.tar", tar.to_vec()),
            Packing::Xz => {
                let mut out = liblzma::write::XzEncoder::new(Vec::new(), 1);
                out.write_all(tar).unwrap();
                ("data.tar.xz", out.finish().unwrap())
            }
            Packing::Gzip => {
                let mut out =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                out.write_all(tar).unwrap();
                ("data.tar.gz", out.finish().unwrap())
            }
            Packing::Zstd => ("data.tar.zst", zstd::encode_all(tar, 1).unwrap()),
        };
        let mut out = ar::Builder::new(Vec::new());
        for (name, bytes) in
            [("debian-binary", b"2.0\n".to_vec()), ("control.tar.xz", vec![1, 2, 3]), (name, data)]
        {
            let header = ar::Header::new(name.as_bytes().to_vec(), bytes.len() as u64);
            out.append(&header, bytes.as_slice()).unwrap();
        }
        out.into_inner().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Packing, deb, package};
    use super::*;

    fn unpack_bytes(bytes: &[u8]) -> (Result<BTreeMap<String, Item>, DebError>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("p.deb");
        fs::write(&file, bytes).unwrap();
        let out = folder.path().join("out");
        (unpack(&file, &out, |path| !path.starts_with("usr/share/doc")), folder)
    }

    const ENTRIES: &[testing::Made<'_>] = &[
        ("usr/bin/a", 0o755, b"program"),
        ("usr/bin/b", 0o777, b"-> a"),
        ("usr/share/doc/a", 0o644, b"text"),
    ];

    #[test]
    fn every_way_of_packing_gives_the_wanted_files() {
        for packing in [Packing::Plain, Packing::Xz, Packing::Gzip, Packing::Zstd] {
            let (items, folder) = unpack_bytes(&package(ENTRIES, packing));
            let items = items.unwrap_or_else(|e| panic!("{packing:?}: {e:?}"));
            assert_eq!(items.keys().collect::<Vec<_>>(), ["usr/bin/a", "usr/bin/b"]);
            assert_eq!(items["usr/bin/b"].kind, Kind::Link("a".to_owned()));
            let sha256 = hex(&Sha256::digest(b"program"));
            assert_eq!(items["usr/bin/a"].kind, Kind::File { size: 7, sha256 });
            assert_eq!(fs::read(folder.path().join("out/usr/bin/a")).unwrap(), b"program");
        }
    }

    #[test]
    fn a_cut_package_is_an_error_wherever_it_is_cut() {
        for packing in [Packing::Xz, Packing::Zstd, Packing::Gzip] {
            let whole = package(ENTRIES, packing);
            for len in (0..whole.len() - 1).step_by(5) {
                // The last bytes are padding and check sums that a reader of tar need not reach.
                let (items, _folder) = unpack_bytes(&whole[..len]);
                if let Ok(items) = items {
                    assert!(len > whole.len() - 64, "{packing:?} cut at {len}");
                    assert_eq!(items.len(), 2);
                }
            }
        }
    }

    #[test]
    fn no_entry_leaves_the_folder() {
        for name in ["../evil", "/etc/passwd", "a/../../evil"] {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(0);
            header.set_mode(0o644);
            header.set_cksum();
            let mut tar = header.as_bytes().to_vec();
            tar.extend_from_slice(&[0; 1024]);
            let (items, _folder) = unpack_bytes(&deb(&tar, Packing::Plain));
            assert!(matches!(items, Err(DebError::Path(_))), "{name}");
        }
        let through_a_link: &[testing::Made<'_>] =
            &[("x", 0o777, b"-> /tmp"), ("x", 0o644, b"second")];
        let (items, folder) = unpack_bytes(&package(through_a_link, Packing::Plain));
        assert_eq!(items.unwrap().len(), 1);
        assert_eq!(fs::read(folder.path().join("out/x")).unwrap(), b"second");
    }

    #[test]
    fn other_archives_and_other_formats_are_named_as_such() {
        assert!(matches!(unpack_bytes(b"").0, Err(DebError::Format | DebError::Read(_))));
        let mut out = ar::Builder::new(Vec::new());
        out.append(&ar::Header::new(b"other".to_vec(), 1), &b"x"[..]).unwrap();
        let other = out.into_inner().unwrap();
        assert!(matches!(unpack_bytes(&other).0, Err(DebError::Format)));
        let mut out = ar::Builder::new(Vec::new());
        out.append(&ar::Header::new(b"debian-binary".to_vec(), 4), &b"2.0\n"[..]).unwrap();
        out.append(&ar::Header::new(b"data.tar.lzo".to_vec(), 1), &b"x"[..]).unwrap();
        let other = out.into_inner().unwrap();
        assert!(matches!(unpack_bytes(&other).0, Err(DebError::NoData)));
    }

    #[test]
    fn mangled_packages_do_not_panic() {
        let whole = package(ENTRIES, Packing::Plain);
        let mut state = 1_u64;
        for _ in 0..150 {
            let mut mangled = whole.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (state >> 20) as usize % mangled.len();
                mangled[at] = (state >> 50) as u8;
            }
            drop(unpack_bytes(&mangled));
        }
    }
}
