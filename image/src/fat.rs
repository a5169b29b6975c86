//! FAT volumes: the loader's partition (FAT32) and the one for `site.toml` (FAT16).
//!
//! A volume is laid out in one go from all of its files and given back as bytes, mostly zeros; identifiers and times
//! are fixed. Called by [`crate::build`] and by whoever makes a stick with a `site.toml` ([`config`]). The library that
//! the tests read volumes with can write them too, but its folders begin with entries that `fsck.vfat` wants to mend.
//!
//! Source: Microsoft's "FAT: General Overview of On-Disk Format", version 1.03.

use skerry_init::gpt::Part;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Label of the partition or stick on which PID 1 looks for `site.toml`.
pub const CONFIG_LABEL: &str = "SKERRYCFG";
/// Label of the loader's partition.
pub const ESP_LABEL: &str = "ESP";

/// A FAT32 volume of the ESP's size. `files` are paths with `/` and contents.
///
/// # Errors
///
/// `InvalidInput` when they do not fit or a path is none; see [`skerry_init::gpt::Part::ESP`] for the size.
pub fn esp(files: &[(String, Vec<u8>)], id: u32) -> io::Result<Vec<u8>> {
    volume(&FAT32, Part::ESP.bytes(), ESP_LABEL, id, files)
}

/// A FAT16 volume of the size of partition `config`.
///
/// # Errors
///
/// As [`esp`].
pub fn config(files: &[(String, Vec<u8>)], id: u32) -> io::Result<Vec<u8>> {
    volume(&FAT16, Part::CONFIG.bytes(), CONFIG_LABEL, id, files)
}

/// What differs between the two.
struct Form {
    reserved: usize,
    /// Entries of the root folder, where it has a place of its own.
    root_entries: usize,
    /// Bytes of an entry of the table.
    entry_bytes: usize,
    /// The first two entries of the table, and the last one of a file.
    marks: [u32; 3],
}

const FAT32: Form = Form {
    reserved: 32,
    root_entries: 0,
    entry_bytes: 4,
    marks: [0x0fff_fff8, 0x0fff_ffff, 0x0fff_ffff],
};
const FAT16: Form =
    Form { reserved: 4, root_entries: 512, entry_bytes: 2, marks: [0xfff8, 0xffff, 0xffff] };

const SECTOR: usize = 512;
/// 1 KiB: with 2 KiB there would be too few clusters for FAT32 in 128 MiB.
const CLUSTER: usize = 1024;
const ENTRY: usize = 32;
const ATTRIBUTE_LABEL: u8 = 0x08;
const ATTRIBUTE_FOLDER: u8 = 0x10;
const ATTRIBUTE_FILE: u8 = 0x20;
const ATTRIBUTE_LONG: u8 = 0x0f;
/// 1 January 1980, the first day that FAT knows: nothing in the volume tells when it was made.
const DATE: u16 = 0x0021;
/// UTF-16 units of a long name in one entry.
const LONG_UNITS: usize = 13;

/// A file or a folder in its parent.
#[derive(Debug)]
enum Child<'a> {
    File(&'a [u8]),
    /// Its path.
    Folder(String),
}

type Folders<'a> = BTreeMap<String, BTreeMap<&'a str, Child<'a>>>;

fn volume(
    form: &Form,
    bytes: u64,
    label: &str,
    id: u32,
    files: &[(String, Vec<u8>)],
) -> io::Result<Vec<u8>> {
    let folders = folders(files)?;
    let sectors = bytes as usize / SECTOR;
    let root_sectors = form.root_entries * ENTRY / SECTOR;
    let mut table_sectors = 1;
    let clusters = loop {
        let clusters =
            (sectors - form.reserved - root_sectors - 2 * table_sectors) * SECTOR / CLUSTER;
        let needed = ((clusters + 2) * form.entry_bytes).div_ceil(SECTOR);
        if needed <= table_sectors {
            break clusters;
        }
        table_sectors = needed;
    };
    let root_at = (form.reserved + 2 * table_sectors) * SECTOR;
    let data_at = root_at + root_sectors * SECTOR;
    let mut out = Volume {
        disk: vec![0; bytes as usize],
        table: vec![form.marks[0], form.marks[1]],
        end: form.marks[2],
        clusters,
        data_at,
    };
    let full = |what: &str| {
        let what = format!("{what} not fit on the volume `{label}` of {bytes} bytes");
        io::Error::new(io::ErrorKind::InvalidInput, what)
    };
    // Folders first, so that their clusters are known when they are written: they refer to each other.
    let mut starts = BTreeMap::new();
    for (path, children) in &folders {
        let dots = if path.is_empty() { 1 } else { 2 };
        let entries: usize = children.keys().map(|name| entries_of(name)).sum::<usize>() + dots;
        let start = match path.is_empty() && form.root_entries > 0 {
            true if entries > form.root_entries => return Err(full("so many files do")),
            true => 0,
            false => out.allocate(entries * ENTRY).ok_or_else(|| full("so many files do"))?,
        };
        starts.insert(path.as_str(), start);
    }
    let root_start = starts.get("").copied().unwrap_or(0);
    for (path, children) in &folders {
        let mut entries = Vec::new();
        if path.is_empty() {
            let mut name = [b' '; 11];
            name[..label.len()].copy_from_slice(label.as_bytes());
            entries.extend(entry(name, ATTRIBUTE_LABEL, 0, 0));
        } else {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            // The root is 0 here, wherever it is.
            let up = if parent.is_empty() { 0 } else { starts[parent] };
            entries.extend(entry(*b".          ", ATTRIBUTE_FOLDER, starts[path.as_str()], 0));
            entries.extend(entry(*b"..         ", ATTRIBUTE_FOLDER, up, 0));
        }
        let mut taken = BTreeSet::new();
        for (name, child) in children {
            let (short, long) = names(name, &mut taken);
            let (attribute, start, size) = match child {
                Child::Folder(path) => (ATTRIBUTE_FOLDER, starts[path.as_str()], 0),
                Child::File(content) => {
                    let start = match content.is_empty() {
                        true => 0,
                        false => out
                            .allocate(content.len())
                            .ok_or_else(|| full(&format!("`{name}` does")))?,
                    };
                    out.fill(start, content);
                    (ATTRIBUTE_FILE, start, content.len() as u32)
                }
            };
            entries.extend(long);
            entries.extend(entry(short, attribute, start, size));
        }
        match starts[path.as_str()] {
            0 => out.disk[root_at..root_at + entries.len()].copy_from_slice(&entries),
            start => out.fill(start, &entries),
        }
    }
    let layout = Layout { sectors, table_sectors, root_start, id, label };
    out.finish(form, &layout);
    Ok(out.disk)
}

/// All folders by path, the root's is empty, with what is in them.
fn folders(files: &[(String, Vec<u8>)]) -> io::Result<Folders<'_>> {
    let mut folders: Folders<'_> = BTreeMap::from([(String::new(), BTreeMap::new())]);
    for (path, content) in files {
        let bad = || {
            let what = format!("`{path}` is no path of a file on a FAT volume, or is there twice");
            io::Error::new(io::ErrorKind::InvalidInput, what)
        };
        let mut folder = String::new();
        let mut pieces = path.split('/').peekable();
        while let Some(name) = pieces.next() {
            let allowed = |byte: u8| byte.is_ascii_graphic() && !b"\"*/:<>?\\|".contains(&byte);
            if name.is_empty()
                || name.len() > 200
                || name.ends_with('.')
                || !name.bytes().all(allowed)
            {
                return Err(bad());
            }
            let below =
                if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
            let children = folders.entry(folder).or_default();
            if children.keys().any(|other| *other != name && other.eq_ignore_ascii_case(name)) {
                return Err(bad());
            }
            let last = pieces.peek().is_none();
            let child = match last {
                true => Child::File(content),
                false => Child::Folder(below.clone()),
            };
            match children.insert(name, child) {
                None => {}
                Some(Child::Folder(_)) if !last => {}
                Some(_) => return Err(bad()),
            }
            if !last {
                folders.entry(below.clone()).or_default();
            }
            folder = below;
        }
    }
    Ok(folders)
}

struct Layout<'a> {
    sectors: usize,
    table_sectors: usize,
    root_start: u32,
    id: u32,
    label: &'a str,
}

struct Volume {
    disk: Vec<u8>,
    table: Vec<u32>,
    /// Last entry of a chain.
    end: u32,
    clusters: usize,
    data_at: usize,
}

impl Volume {
    /// Takes the next clusters, in a row, for so many bytes.
    fn allocate(&mut self, bytes: usize) -> Option<u32> {
        let count = bytes.div_ceil(CLUSTER).max(1);
        let start = self.table.len();
        if start + count > self.clusters + 2 {
            return None;
        }
        self.table.extend((start + 1..start + count).map(|next| next as u32));
        self.table.push(self.end);
        Some(start as u32)
    }

    fn fill(&mut self, start: u32, content: &[u8]) {
        if !content.is_empty() {
            let at = self.data_at + (start as usize - 2) * CLUSTER;
            self.disk[at..at + content.len()].copy_from_slice(content);
        }
    }

    /// Writes what describes the rest.
    fn finish(&mut self, form: &Form, layout: &Layout<'_>) {
        for copy in 0..2 {
            let at = (form.reserved + copy * layout.table_sectors) * SECTOR;
            for (number, entry) in self.table.iter().enumerate() {
                let at = at + number * form.entry_bytes;
                self.disk[at..at + form.entry_bytes]
                    .copy_from_slice(&entry.to_le_bytes()[..form.entry_bytes]);
            }
        }
        let mut boot = [0; SECTOR];
        let mut put = |at: usize, bytes: &[u8]| boot[at..at + bytes.len()].copy_from_slice(bytes);
        let two = |number: usize| (number as u16).to_le_bytes();
        let four = |number: usize| (number as u32).to_le_bytes();
        let wide = form.entry_bytes == 4;
        put(0, if wide { &[0xeb, 0x58, 0x90] } else { &[0xeb, 0x3c, 0x90] });
        put(3, b"SKERRY  ");
        put(11, &two(SECTOR));
        put(13, &[(CLUSTER / SECTOR) as u8]);
        put(14, &two(form.reserved));
        put(16, &[2]);
        put(17, &two(form.root_entries));
        let narrow_sectors = u16::try_from(layout.sectors).unwrap_or(0);
        put(19, &narrow_sectors.to_le_bytes());
        put(21, &[0xf8]);
        put(24, &two(63));
        put(26, &two(255));
        if narrow_sectors == 0 {
            put(32, &four(layout.sectors));
        }
        if wide {
            put(36, &four(layout.table_sectors));
            put(44, &four(layout.root_start as usize));
            put(48, &two(1));
            put(50, &two(6));
        } else {
            put(22, &two(layout.table_sectors));
        }
        let tail = if wide { 64 } else { 36 };
        put(tail, &[0x80, 0, 0x29]);
        put(tail + 3, &layout.id.to_le_bytes());
        put(tail + 7, &[b' '; 11]);
        put(tail + 7, layout.label.as_bytes());
        put(tail + 18, if wide { b"FAT32   " } else { b"FAT16   " });
        put(510, &[0x55, 0xaa]);
        self.disk[..SECTOR].copy_from_slice(&boot);
        if wide {
            let free = self.clusters + 2 - self.table.len();
            let mut info = [0; SECTOR];
            info[..4].copy_from_slice(b"RRaA");
            info[484..488].copy_from_slice(b"rrAa");
            info[488..492].copy_from_slice(&four(free));
            info[492..496].copy_from_slice(&four(self.table.len()));
            info[508..].copy_from_slice(&[0, 0, 0x55, 0xaa]);
            self.disk[SECTOR..2 * SECTOR].copy_from_slice(&info);
            self.disk.copy_within(..2 * SECTOR, 6 * SECTOR);
        }
    }
}

fn entry(name: [u8; 11], attribute: u8, start: u32, size: u32) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    bytes[..11].copy_from_slice(&name);
    bytes[11] = attribute;
    for at in [16, 18, 24] {
        bytes[at..at + 2].copy_from_slice(&DATE.to_le_bytes());
    }
    bytes[20..22].copy_from_slice(&start.to_le_bytes()[2..]);
    bytes[26..28].copy_from_slice(&start.to_le_bytes()[..2]);
    bytes[28..].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// A name of upper-case letters with at most eight before and three behind the dot needs no long one.
fn short_name(name: &str) -> Option<[u8; 11]> {
    let (stem, ending) = name.rsplit_once('.').unwrap_or((name, ""));
    let allowed =
        |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"_-~".contains(&byte);
    let sound = (1..=8).contains(&stem.len()) && ending.len() <= 3;
    if !sound || !stem.bytes().chain(ending.bytes()).all(allowed) {
        return None;
    }
    let mut bytes = [b' '; 11];
    bytes[..stem.len()].copy_from_slice(stem.as_bytes());
    bytes[8..8 + ending.len()].copy_from_slice(ending.as_bytes());
    Some(bytes)
}

/// Entries that a file takes in its folder.
fn entries_of(name: &str) -> usize {
    match short_name(name) {
        Some(_) => 1,
        None => 1 + name.len().div_ceil(LONG_UNITS),
    }
}

/// The short name, and the entries of the long one.
fn names(name: &str, taken: &mut BTreeSet<[u8; 11]>) -> ([u8; 11], Vec<u8>) {
    if let Some(short) = short_name(name) {
        taken.insert(short);
        return (short, Vec::new());
    }
    let upper: String = name.to_ascii_uppercase();
    let (stem, ending) = upper.rsplit_once('.').unwrap_or((&upper, ""));
    let clean = |text: &str, most: usize| -> String {
        text.chars().filter(char::is_ascii_alphanumeric).take(most).collect()
    };
    let (stem, ending) = (clean(stem, 4), clean(ending, 3));
    let short = (1_u32..=999).find_map(|number| {
        let short = short_name(&format!("{stem}~{number}.{ending}"))?;
        taken.insert(short).then_some(short)
    });
    let short = short.expect("there are fewer files in a folder");
    let sum = short.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let mut units: Vec<u16> = name.encode_utf16().collect();
    let pieces = units.len().div_ceil(LONG_UNITS);
    if units.len() < pieces * LONG_UNITS {
        units.push(0);
        units.resize(pieces * LONG_UNITS, 0xffff);
    }
    let mut long = Vec::new();
    for (number, piece) in units.chunks(LONG_UNITS).enumerate().rev() {
        let mut bytes = [0; ENTRY];
        bytes[0] = (number + 1) as u8 | if number + 1 == pieces { 0x40 } else { 0 };
        bytes[11] = ATTRIBUTE_LONG;
        bytes[13] = sum;
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain([28, 30]);
        for (unit, at) in piece.iter().zip(places) {
            bytes[at..at + 2].copy_from_slice(&unit.to_le_bytes());
        }
        long.extend_from_slice(&bytes);
    }
    (short, long)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Cursor, Read};

    fn files() -> Vec<(String, Vec<u8>)> {
        vec![
            ("EFI/BOOT/BOOTX64.EFI".into(), vec![1; 120_000]),
            ("EFI/Linux/skerry_0.1.0.efi".into(), vec![2; 3_000_000]),
            ("loader/loader.conf".into(), b"timeout 0\n".to_vec()),
        ]
    }

    #[test]
    fn files_are_read_back_and_two_volumes_are_equal() {
        let bytes = esp(&files(), 0x1234_5678).unwrap();
        assert!(bytes == esp(&files(), 0x1234_5678).unwrap());
        assert_eq!(bytes.len() as u64, Part::ESP.bytes());
        assert_eq!(&bytes[71..82], b"ESP        ");
        let volume = fatfs::FileSystem::new(Cursor::new(bytes), fatfs::FsOptions::new()).unwrap();
        assert_eq!(volume.fat_type(), fatfs::FatType::Fat32);
        assert_eq!(volume.volume_id(), 0x1234_5678);
        for (path, content) in files() {
            let mut read = Vec::new();
            volume.root_dir().open_file(&path).unwrap().read_to_end(&mut read).unwrap();
            assert!(read == content, "{path}");
        }
    }

    #[test]
    fn label_of_the_configuration_is_where_pid_1_looks() {
        let bytes = config(&[("site.toml".into(), b"revision = 1\n".to_vec())], 7).unwrap();
        assert_eq!(&bytes[43..54], b"SKERRYCFG  ");
        let volume = fatfs::FileSystem::new(Cursor::new(bytes), fatfs::FsOptions::new()).unwrap();
        assert_eq!(volume.fat_type(), fatfs::FatType::Fat16);
        assert_eq!(
            volume.read_volume_label_from_root_dir().unwrap().as_deref(),
            Some(CONFIG_LABEL)
        );
    }

    #[test]
    fn too_much_is_refused() {
        let large = |bytes: u64| vec![("a".to_owned(), vec![1; bytes as usize])];
        assert!(config(&large(Part::CONFIG.bytes() + 1), 0).is_err());
        let error = config(&large(Part::CONFIG.bytes() - 100), 0).unwrap_err();
        assert!(error.to_string().contains("`a` does not fit"), "{error}");
    }

    #[test]
    fn every_way_to_name_a_file_is_read_back_or_refused() {
        let names = [
            "A",
            "LONGNAME.TXT",
            "longname.txt",
            "Longname2.txt",
            "x.y.z",
            "thirteen.char",
            "a+b-c.efi",
        ];
        let mut files: Vec<_> =
            names.iter().map(|name| ((*name).to_owned(), name.as_bytes().to_vec())).collect();
        files.remove(1);
        files.push(("d/e/f/empty".into(), Vec::new()));
        files.extend(
            (0..60).map(|number| {
                (format!("many/file number {number}").replace(' ', "-"), vec![number])
            }),
        );
        let volume = |files: &[(String, Vec<u8>)]| esp(files, 1);
        let bytes = volume(&files).unwrap();
        let read = fatfs::FileSystem::new(Cursor::new(bytes), fatfs::FsOptions::new()).unwrap();
        for (path, content) in &files {
            let mut found = Vec::new();
            read.root_dir().open_file(path).expect(path).read_to_end(&mut found).unwrap();
            assert!(found == *content, "{path}");
        }
        for bad in ["", "/a", "a//b", "a.", "a:b", "a b/", "ä"] {
            assert!(volume(&[(bad.into(), Vec::new())]).is_err(), "{bad}");
        }
        let twice =
            |a: &str, b: &str| volume(&[(a.into(), Vec::new()), (b.into(), Vec::new())]).is_err();
        assert!(twice("a", "a") && twice("a", "A") && twice("a", "a/b") && twice("a/b", "a"));
    }

    #[test]
    fn fsck_finds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let many: Vec<_> =
            (0..200).map(|number| (format!("folder/a-long-name-{number}.txt"), vec![1])).collect();
        let volumes = [
            ("esp", esp(&files(), 1).unwrap()),
            ("config", config(&[], 2).unwrap()),
            ("many", config(&many, 3).unwrap()),
        ];
        for (name, bytes) in volumes {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let Ok(output) = std::process::Command::new("fsck.vfat").arg("-n").arg(&path).output()
            else {
                eprintln!("not compared: there is no fsck.vfat here");
                return;
            };
            let told = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{name}: {told}");
        }
    }
}
