//! Where the partitions of a disk image are: a reader of the primary GUID partition table, for tests only.
//!
//! It trusts the image: it does not check checksums, which is the business of the programs under test.
//!
//! Source of the facts: UEFI specification, chapter 5 (GPT).

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Entries that are looked at.
const ENTRIES_MAX: u32 = 128;

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its name in the table.
    pub label: String,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// The partitions of a raw disk image, in the order of the table.
pub fn partitions(disk: &Path) -> Result<Vec<Partition>> {
    let file = File::open(disk).with_context(|| format!("could not open {}", disk.display()))?;
    read(&file).with_context(|| format!("{} has no partition table", disk.display()))
}

/// One partition by its label.
pub fn partition(disk: &Path, label: &str) -> Result<Partition> {
    let all = partitions(disk)?;
    let found = all.into_iter().find(|partition| partition.label == label);
    found.with_context(|| format!("{} has no partition `{label}`", disk.display()))
}

fn read(file: &File) -> Result<Vec<Partition>> {
    let mut header = [0; 92];
    file.read_exact_at(&mut header, SECTOR)?;
    ensure!(&header[..8] == b"EFI PART", "no GPT signature");
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let table = u64::from_le_bytes(header[72..80].try_into().expect("8 bytes")) * SECTOR;
    let (count, size) = (u32_at(80), u32_at(84));
    ensure!((128..=4096).contains(&size), "entries of {size} bytes");
    let mut found = Vec::new();
    for index in 0..count.min(ENTRIES_MAX) {
        let mut entry = [0; 128];
        file.read_exact_at(&mut entry, table + u64::from(index) * u64::from(size))?;
        if entry[..16] == [0; 16] {
            continue;
        }
        let u64_at = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("8 bytes"));
        let (first, last) = (u64_at(32), u64_at(40));
        ensure!(first <= last, "a partition ends before it starts");
        let name: Vec<u16> = entry[56..128]
            .chunks_exact(2)
            .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
            .take_while(|unit| *unit != 0)
            .collect();
        found.push(Partition {
            label: String::from_utf16_lossy(&name),
            start: first * SECTOR,
            length: (last - first + 1) * SECTOR,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_found_by_label_and_a_foreign_disk_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(partitions(&path).is_err());
        let mut header = [0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[72] = 2;
        header[80] = 4;
        header[84] = 128;
        file.write_all_at(&header, SECTOR).unwrap();
        let mut entry = [0; 128];
        entry[0] = 1;
        entry[32..40].copy_from_slice(&2048u64.to_le_bytes());
        entry[40..48].copy_from_slice(&4095u64.to_le_bytes());
        for (index, unit) in "state".encode_utf16().enumerate() {
            entry[56 + 2 * index..58 + 2 * index].copy_from_slice(&unit.to_le_bytes());
        }
        // The second of four entries; the others are unused.
        file.write_all_at(&entry, 2 * SECTOR + 128).unwrap();
        let expected = Partition { label: "state".into(), start: 1 << 20, length: 1 << 20 };
        assert_eq!(partition(&path, "state").unwrap(), expected);
        let error = partition(&path, "esp").unwrap_err().to_string();
        assert!(error.contains("no partition `esp`"), "{error}");
    }
}
