//! The partition table: a codec of GPT, and the layout of the appliance's disk.
//!
//! The builder of the image writes the table of the flash file with it; PID 1 reads it, repairs it from its copy, and
//! adds the partitions that are not in the flash file at the first boot. It holds no file and no clock: bytes in, bytes
//! and offsets out, so that every error path is tested without a disk.
//!
//! [`Table::writes`] gives the writes in the order that survives a loss of power between any two of them.
//!
//! Source: UEFI specification 2.10, chapter 5; the layout is explained in docs/appliance.md.

use sha2::{Digest, Sha256};
use std::fmt;

/// Bytes in a sector. Disks with other logical sectors are refused by PID 1.
pub const SECTOR: u64 = 512;
/// Sectors in a MiB, to which every partition is aligned.
pub const SECTORS_PER_MIB: u64 = (1 << 20) / SECTOR;
/// Bytes that [`Table::decode`] wants from the start of the disk: protective MBR, header, entries.
pub const HEAD_BYTES: usize = (2 + ENTRY_SECTORS as usize) * SECTOR as usize;
/// Bytes that [`Table::decode`] wants from the end of the disk: entries, header.
pub const TAIL_BYTES: usize = (1 + ENTRY_SECTORS as usize) * SECTOR as usize;
/// Attribute bit 63: other systems do not mount the partition by themselves.
pub const NO_AUTO_MOUNT: u64 = 1 << 63;
/// Smallest state partition with which a disk is taken.
pub const STATE_MIB_MIN: u64 = 1024;

const ENTRY_BYTES: usize = 128;
const ENTRIES: usize = 128;
const ENTRY_SECTORS: u64 = (ENTRY_BYTES * ENTRIES) as u64 / SECTOR;
const HEADER_BYTES: usize = 92;
const SIGNATURE: &[u8; 8] = b"EFI PART";
const REVISION: u32 = 0x0001_0000;
/// UTF-16 units in a partition's name.
const NAME_UNITS: usize = 36;

/// One partition of the appliance's layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its name in the table, and its place: `Part::ESP` is partition 1.
    pub label: &'static str,
    /// Its number, from 1.
    pub number: usize,
    /// Size; 0 is the rest of the disk.
    pub mib: u64,
    /// Whether the flash file holds it. The others are made at the first boot.
    pub in_image: bool,
    kind: &'static str,
    attributes: u64,
}

impl Part {
    /// Loader and UKIs.
    pub const ESP: Self = Self::new("esp", 1, 128, true, "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", 0);
    /// `site.toml`; of the type that other systems mount.
    pub const CONFIG: Self =
        Self::new("config", 2, 8, true, "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0);
    /// First root.
    pub const ROOT_A: Self = Self::new("root-a", 3, 192, true, ROOT_KIND, NO_AUTO_MOUNT);
    /// Second root.
    pub const ROOT_B: Self = Self::new("root-b", 4, 192, false, ROOT_KIND, NO_AUTO_MOUNT);
    /// All that is written.
    pub const STATE: Self =
        Self::new("state", 5, 0, false, "4d21b016-b534-45c2-a9fb-5c16e091fd2d", NO_AUTO_MOUNT);
    /// All of them, in the order of the disk.
    pub const ALL: [Self; 5] = [Self::ESP, Self::CONFIG, Self::ROOT_A, Self::ROOT_B, Self::STATE];

    const fn new(
        label: &'static str,
        number: usize,
        mib: u64,
        in_image: bool,
        kind: &'static str,
        attributes: u64,
    ) -> Self {
        Self { label, number, mib, in_image, kind, attributes }
    }

    /// Type GUID.
    pub fn kind(&self) -> Guid {
        Guid::parse(self.kind).expect("the layout's GUIDs are written in this file")
    }

    /// Its size in bytes; 0 when it is the rest of the disk.
    pub const fn bytes(&self) -> u64 {
        self.mib << 20
    }
}

const ROOT_KIND: &str = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709";

/// Bytes of the flash file: a MiB before the first partition, those in the image, a MiB for the copy of the table.
pub const IMAGE_BYTES: u64 = (2 + Part::ESP.mib + Part::CONFIG.mib + Part::ROOT_A.mib) << 20;
/// Bytes of the smallest disk on which the appliance starts: everything, and a state of [`STATE_MIB_MIN`].
pub const DISK_BYTES_MIN: u64 = IMAGE_BYTES + ((Part::ROOT_B.mib + STATE_MIB_MIN) << 20);

/// A GUID, in the byte order of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// Reads `c12a7328-f81f-11d2-ba4b-00a0c93ec93b`, in upper or lower case.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
        let dashes = text.bytes().enumerate().filter(|(_, byte)| *byte == b'-');
        if digits.len() != 32 || !dashes.map(|(at, _)| at).eq([8, 13, 18, 23]) {
            return None;
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| (pair[at] as char).to_digit(16);
            *byte = (digit(0)? * 16 + digit(1)?) as u8;
        }
        Some(Self(swap(bytes)))
    }

    /// A GUID that follows from `words` and is the same wherever they are.
    pub fn derive(words: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for word in words {
            hash.update((word.len() as u64).to_le_bytes());
            hash.update(word);
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize()[..16]);
        // Version 8 is for GUIDs that everybody makes in their own way.
        Self::versioned(bytes, 8)
    }

    /// A GUID of 16 random bytes.
    pub fn random(bytes: [u8; 16]) -> Self {
        Self::versioned(bytes, 4)
    }

    fn versioned(mut bytes: [u8; 16], version: u8) -> Self {
        bytes[6] = bytes[6] & 0x0f | version << 4;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(swap(bytes))
    }

    /// The bytes in the order in which they are printed.
    pub fn printed(&self) -> [u8; 16] {
        swap(self.0)
    }

    fn is_zero(&self) -> bool {
        self.0 == [0; 16]
    }
}

/// Between the printed order and that of the disk, whose first three fields are little-endian.
fn swap(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.printed().iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One partition of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// From 1, as in `/dev/sda1`.
    pub number: usize,
    /// What is in it.
    pub kind: Guid,
    /// Itself (PARTUUID).
    pub id: Guid,
    /// First sector.
    pub first: u64,
    /// Last sector, itself included.
    pub last: u64,
    /// Attribute bits.
    pub attributes: u64,
    /// Its name, at most 36 units of UTF-16.
    pub label: String,
}

impl Partition {
    /// Where it begins, in bytes.
    pub fn offset(&self) -> u64 {
        self.first * SECTOR
    }

    /// How long it is, in bytes.
    pub fn bytes(&self) -> u64 {
        (self.last - self.first + 1) * SECTOR
    }
}

/// Which of the two tables on the disk was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// That at the start, and the one at the end of the disk is the same.
    Primary,
    /// That at the start; the copy is missing, broken or another one. Normal on a disk that is larger than the flash file.
    PrimaryOnly,
    /// The copy at the end; the one at the start is broken. [`Table::writes`] repairs it.
    Backup,
}

/// A partition table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The disk's own GUID.
    pub disk: Guid,
    /// Sectors of the disk, all of them.
    pub sectors: u64,
    /// By number, ascending.
    pub partitions: Vec<Partition>,
}

/// Why there is no table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GptError {
    /// Neither start nor end of the disk has one.
    #[error("the disk has no partition table (start: {head}; end: {tail})")]
    None {
        /// What is wrong at the start.
        head: Fault,
        /// What is wrong at the end.
        tail: Fault,
    },
    /// The layout does not fit.
    #[error("the disk has {have} bytes, at least {need} are needed")]
    TooSmall {
        /// Bytes of the disk.
        have: u64,
        /// Bytes that are needed.
        need: u64,
    },
    /// A partition is where another one has to go.
    #[error("partition {number} (`{label}`) is in the way of `{wanted}`")]
    InTheWay {
        /// Its number.
        number: usize,
        /// Its name.
        label: String,
        /// What is to be added.
        wanted: &'static str,
    },
    /// A partition of the flash file is not there.
    #[error("the disk has no partition `{0}`")]
    Missing(&'static str),
    /// A value cannot be written.
    #[error("partition {number} cannot be written: {what}")]
    Unwritable {
        /// Its number.
        number: usize,
        /// Why.
        what: &'static str,
    },
}

/// What is wrong with one of the two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Fewer bytes than a table has.
    #[error("too short")]
    Short,
    /// No header there.
    #[error("no header")]
    Signature,
    /// A header of another revision, or with another size or number of entries than this codec knows.
    #[error("a header of an unknown form")]
    Form,
    /// Header that was changed.
    #[error("wrong checksum of the header")]
    HeaderChecksum,
    /// Header that was copied from elsewhere.
    #[error("a header that belongs to another place")]
    Place,
    /// Entries that were changed.
    #[error("wrong checksum of the entries")]
    EntriesChecksum,
    /// A partition outside of the disk, turned around, or over another one.
    #[error("partitions that overlap or lie outside of the disk")]
    Extent,
}

/// What to write where. The first list is written and flushed before the second is begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writes {
    /// Entries and header at the end of the disk: offset in bytes, bytes.
    pub backup: Vec<(u64, Vec<u8>)>,
    /// Entries, header and protective MBR at its start.
    pub primary: Vec<(u64, Vec<u8>)>,
}

impl Table {
    /// Reads the table of a disk of `sectors` sectors from its first [`HEAD_BYTES`] and its last [`TAIL_BYTES`].
    ///
    /// # Errors
    ///
    /// [`GptError::None`] when neither can be used.
    pub fn decode(head: &[u8], tail: &[u8], sectors: u64) -> Result<(Self, Origin), GptError> {
        let sector = SECTOR as usize;
        let primary = match head.len() < HEAD_BYTES {
            true => Err(Fault::Short),
            false => {
                decode_one(&head[sector..2 * sector], &head[2 * sector..HEAD_BYTES], 1, sectors)
            }
        };
        let entries = TAIL_BYTES - sector;
        let backup = match tail.len() < TAIL_BYTES || sectors == 0 {
            true => Err(Fault::Short),
            false => decode_one(&tail[entries..], &tail[..entries], sectors - 1, sectors),
        };
        match (primary, backup) {
            (Ok(table), Ok(copy)) if table == copy => Ok((table, Origin::Primary)),
            (Ok(table), _) => Ok((table, Origin::PrimaryOnly)),
            (Err(_), Ok(table)) => Ok((table, Origin::Backup)),
            (Err(head), Err(tail)) => Err(GptError::None { head, tail }),
        }
    }

    /// The table of a flash file. `seed` is a word for everything that the file is made of: the same word gives the
    /// same GUIDs.
    pub fn of_image(seed: &str) -> Self {
        let mut table = Self {
            disk: Guid::derive(&["skerry disk", seed]),
            sectors: IMAGE_BYTES / SECTOR,
            partitions: Vec::new(),
        };
        let mut first = SECTORS_PER_MIB;
        for part in Part::ALL.iter().filter(|part| part.in_image) {
            let last = first + part.mib * SECTORS_PER_MIB - 1;
            table.partitions.push(Partition {
                number: part.number,
                kind: part.kind(),
                id: Guid::derive(&["skerry partition", seed, part.label]),
                first,
                last,
                attributes: part.attributes,
                label: part.label.into(),
            });
            first = last + 1;
        }
        table
    }

    /// The table for a disk of `sectors` sectors at its first boot: with `root-b` and `state`, and with new GUIDs for
    /// the disk and every partition but the ESP, so that two disks with one image can be told apart. `None` when the
    /// disk has its state already.
    ///
    /// `random` gives 16 random bytes.
    ///
    /// # Errors
    ///
    /// [`GptError`] when the disk is too small or something foreign is on it.
    pub fn for_first_boot(
        &self,
        sectors: u64,
        mut random: impl FnMut() -> [u8; 16],
    ) -> Result<Option<Self>, GptError> {
        if self.by_label(Part::STATE.label).is_some() {
            return Ok(None);
        }
        for part in Part::ALL.iter().filter(|part| part.in_image) {
            self.by_label(part.label).ok_or(GptError::Missing(part.label))?;
        }
        let have = sectors.saturating_mul(SECTOR);
        if have < DISK_BYTES_MIN {
            return Err(GptError::TooSmall { have, need: DISK_BYTES_MIN });
        }
        let mut table = self.clone();
        table.sectors = sectors;
        let end = self.partitions.iter().filter(|one| one.number <= Part::ROOT_A.number);
        let end = end.map(|one| one.last).max().unwrap_or(0);
        let mut first = (end / SECTORS_PER_MIB + 1) * SECTORS_PER_MIB;
        // The last MiB that ends before the copy of the table.
        let usable_end = (sectors - ENTRY_SECTORS - 1) / SECTORS_PER_MIB * SECTORS_PER_MIB;
        for part in Part::ALL.iter().filter(|part| !part.in_image) {
            let last = match part.mib {
                0 => usable_end - 1,
                mib => first + mib * SECTORS_PER_MIB - 1,
            };
            let taken = |one: &&Partition| {
                one.number == part.number || (one.first <= last && first <= one.last)
            };
            if let Some(other) = table.partitions.iter().find(taken) {
                return Err(GptError::InTheWay {
                    number: other.number,
                    label: other.label.clone(),
                    wanted: part.label,
                });
            }
            table.partitions.push(Partition {
                number: part.number,
                kind: part.kind(),
                id: Guid::default(),
                first,
                last,
                attributes: part.attributes,
                label: part.label.into(),
            });
            first = last + 1;
        }
        table.partitions.sort_by_key(|one| one.number);
        table.disk = Guid::random(random());
        for one in table.partitions.iter_mut().filter(|one| one.label != Part::ESP.label) {
            one.id = Guid::random(random());
        }
        Ok(Some(table))
    }

    /// The partition with this name; the first one, if there are two.
    pub fn by_label(&self, label: &str) -> Option<&Partition> {
        self.partitions.iter().find(|one| one.label == label)
    }

    /// What to write, and in which order.
    ///
    /// # Errors
    ///
    /// [`GptError`] when a partition has a number, a name or a place that a table cannot hold.
    pub fn writes(&self) -> Result<Writes, GptError> {
        let entries = self.entries()?;
        let checksum = crc32(&entries);
        let end = self.sectors - 1;
        let backup_entries = end - ENTRY_SECTORS;
        Ok(Writes {
            backup: vec![
                (backup_entries * SECTOR, entries.clone()),
                (end * SECTOR, self.header(end, 1, backup_entries, checksum)),
            ],
            primary: vec![
                (2 * SECTOR, entries),
                (SECTOR, self.header(1, end, 2, checksum)),
                (0, self.protective_mbr()),
            ],
        })
    }

    fn entries(&self) -> Result<Vec<u8>, GptError> {
        let mut bytes = vec![0; ENTRY_BYTES * ENTRIES];
        let need = (2 * (ENTRY_SECTORS + 1) + 1) * SECTOR;
        if self.sectors * SECTOR < need {
            return Err(GptError::TooSmall { have: self.sectors * SECTOR, need });
        }
        for one in &self.partitions {
            let fail = |what| Err(GptError::Unwritable { number: one.number, what });
            let name: Vec<u16> = one.label.encode_utf16().collect();
            if !(1..=ENTRIES).contains(&one.number) {
                return fail("its number is not between 1 and 128");
            }
            if name.len() > NAME_UNITS {
                return fail("its name is longer than 36 characters");
            }
            if one.first > one.last
                || one.first < first_usable()
                || one.last > last_usable(self.sectors)
            {
                return fail("it does not lie on the disk");
            }
            let entry = &mut bytes[(one.number - 1) * ENTRY_BYTES..][..ENTRY_BYTES];
            entry[..16].copy_from_slice(&one.kind.0);
            entry[16..32].copy_from_slice(&one.id.0);
            entry[32..40].copy_from_slice(&one.first.to_le_bytes());
            entry[40..48].copy_from_slice(&one.last.to_le_bytes());
            entry[48..56].copy_from_slice(&one.attributes.to_le_bytes());
            for (unit, place) in name.iter().zip(entry[56..].chunks_exact_mut(2)) {
                place.copy_from_slice(&unit.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    fn header(&self, place: u64, other: u64, entries: u64, entries_checksum: u32) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        bytes[..8].copy_from_slice(SIGNATURE);
        bytes[8..12].copy_from_slice(&REVISION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(HEADER_BYTES as u32).to_le_bytes());
        bytes[24..32].copy_from_slice(&place.to_le_bytes());
        bytes[32..40].copy_from_slice(&other.to_le_bytes());
        bytes[40..48].copy_from_slice(&first_usable().to_le_bytes());
        bytes[48..56].copy_from_slice(&last_usable(self.sectors).to_le_bytes());
        bytes[56..72].copy_from_slice(&self.disk.0);
        bytes[72..80].copy_from_slice(&entries.to_le_bytes());
        bytes[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        bytes[84..88].copy_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
        bytes[88..92].copy_from_slice(&entries_checksum.to_le_bytes());
        let checksum = crc32(&bytes[..HEADER_BYTES]);
        bytes[16..20].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// An MBR that shows old tools one partition over all of the disk.
    fn protective_mbr(&self) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        let entry = &mut bytes[446..462];
        entry[1..4].copy_from_slice(&[0, 2, 0]);
        entry[4] = 0xee;
        entry[5..8].copy_from_slice(&[0xff, 0xff, 0xff]);
        entry[8..12].copy_from_slice(&1_u32.to_le_bytes());
        let sectors = u32::try_from(self.sectors - 1).unwrap_or(u32::MAX);
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
        bytes[510..].copy_from_slice(&[0x55, 0xaa]);
        bytes
    }
}

const fn first_usable() -> u64 {
    2 + ENTRY_SECTORS
}

const fn last_usable(sectors: u64) -> u64 {
    sectors.saturating_sub(ENTRY_SECTORS + 2)
}

fn decode_one(header: &[u8], entries: &[u8], place: u64, sectors: u64) -> Result<Table, Fault> {
    let u32_at = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if &header[..8] != SIGNATURE {
        return Err(Fault::Signature);
    }
    if u32_at(8) != REVISION || u32_at(12) as usize != HEADER_BYTES {
        return Err(Fault::Form);
    }
    let mut zeroed = header[..HEADER_BYTES].to_vec();
    zeroed[16..20].fill(0);
    if crc32(&zeroed) != u32_at(16) {
        return Err(Fault::HeaderChecksum);
    }
    if u32_at(80) as usize != ENTRIES || u32_at(84) as usize != ENTRY_BYTES {
        return Err(Fault::Form);
    }
    let entries_at = if place == 1 { 2 } else { place.saturating_sub(ENTRY_SECTORS) };
    if u64_at(24) != place || u64_at(72) != entries_at {
        return Err(Fault::Place);
    }
    if crc32(entries) != u32_at(88) {
        return Err(Fault::EntriesChecksum);
    }
    let mut partitions: Vec<Partition> = Vec::new();
    for (index, entry) in entries.chunks_exact(ENTRY_BYTES).enumerate() {
        let guid = |at: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&entry[at..at + 16]);
            Guid(bytes)
        };
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&entry[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let kind = guid(0);
        if kind.is_zero() {
            continue;
        }
        let (first, last) = (number(32), number(40));
        let overlaps = partitions.iter().any(|one| one.first <= last && first <= one.last);
        if first > last || first < first_usable() || last > last_usable(sectors) || overlaps {
            return Err(Fault::Extent);
        }
        let units = entry[56..].chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        partitions.push(Partition {
            number: index + 1,
            kind,
            id: guid(16),
            first,
            last,
            attributes: number(48),
            label: String::from_utf16_lossy(&units),
        });
    }
    let mut disk = [0; 16];
    disk.copy_from_slice(&header[56..72]);
    Ok(Table { disk: Guid(disk), sectors, partitions })
}

/// CRC-32 as in Ethernet and zip. The table is 17 KiB: a bit at a time is quick enough.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk in memory that keeps only its two ends.
    struct Disk {
        head: Vec<u8>,
        tail: Vec<u8>,
        sectors: u64,
    }

    impl Disk {
        fn new(sectors: u64) -> Self {
            Self { head: vec![0; HEAD_BYTES], tail: vec![0; TAIL_BYTES], sectors }
        }

        fn write(&mut self, writes: &[(u64, Vec<u8>)]) {
            let tail_at = self.sectors * SECTOR - TAIL_BYTES as u64;
            for (offset, bytes) in writes {
                let (area, at) = match *offset >= tail_at {
                    true => (&mut self.tail, offset - tail_at),
                    false => (&mut self.head, *offset),
                };
                area[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            }
        }

        fn read(&self) -> Result<(Table, Origin), GptError> {
            Table::decode(&self.head, &self.tail, self.sectors)
        }
    }

    fn counter() -> impl FnMut() -> [u8; 16] {
        let mut count = 0;
        move || {
            count += 1;
            [count; 16]
        }
    }

    const LARGE: u64 = (8 << 30) / SECTOR;

    #[test]
    fn checksum_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn guids_are_printed_as_they_are_read() {
        let text = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
        let guid = Guid::parse(&text.to_uppercase()).expect("a GUID");
        assert_eq!(guid.to_string(), text);
        assert_eq!(guid.0[..4], [0x28, 0x73, 0x2a, 0xc1], "little-endian on the disk");
        for bad in [
            "",
            "c12a7328",
            "c12a7328-f81f-11d2-ba4b-00a0c93ec93",
            "c12a7328f-81f-11d2-ba4b-00a0c93ec93b",
            "c12a7328-f81f-11d2-ba4b-00a0c93ec93g",
        ] {
            assert_eq!(Guid::parse(bad), None, "{bad}");
        }
        let derived = Guid::derive(&["a", "b"]);
        assert_eq!(derived, Guid::derive(&["a", "b"]));
        assert_ne!(derived, Guid::derive(&["ab", ""]), "the borders of words count");
        assert_eq!(derived.to_string().as_bytes()[14], b'8');
        assert_eq!(Guid::random([0xff; 16]).to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }

    #[test]
    fn table_of_the_image_is_read_back_from_either_end() {
        let table = Table::of_image("1.0");
        let mut disk = Disk::new(table.sectors);
        let writes = table.writes().expect("fits");
        disk.write(&writes.backup);
        assert_eq!(disk.read(), Ok((table.clone(), Origin::Backup)));
        disk.write(&writes.primary);
        assert_eq!(disk.read(), Ok((table.clone(), Origin::Primary)));
        disk.tail.fill(0);
        assert_eq!(disk.read(), Ok((table.clone(), Origin::PrimaryOnly)));
        disk.head.fill(0);
        assert_eq!(
            disk.read(),
            Err(GptError::None { head: Fault::Signature, tail: Fault::Signature })
        );
        let labels: Vec<_> = table.partitions.iter().map(|one| one.label.as_str()).collect();
        assert_eq!(labels, ["esp", "config", "root-a"]);
        assert!(table.partitions.iter().all(|one| one.first % SECTORS_PER_MIB == 0));
        assert_eq!(table.by_label("root-a").expect("there").attributes, NO_AUTO_MOUNT);
    }

    #[test]
    fn first_boot_adds_what_the_flash_file_does_not_have() {
        let image = Table::of_image("1.0");
        let table = image.for_first_boot(LARGE, counter()).expect("fits").expect("is new");
        let labels: Vec<_> =
            table.partitions.iter().map(|one| (one.number, one.label.as_str())).collect();
        assert_eq!(labels, [(1, "esp"), (2, "config"), (3, "root-a"), (4, "root-b"), (5, "state")]);
        let state = table.by_label("state").expect("there");
        assert_eq!(state.first % SECTORS_PER_MIB, 0);
        assert_eq!((state.last + 1) % SECTORS_PER_MIB, 0);
        assert!(LARGE - state.last < 2 * SECTORS_PER_MIB, "state has the rest of the disk");
        assert_eq!(table.by_label("root-b").expect("there").bytes(), Part::ROOT_B.bytes());
        assert_ne!(table.disk, image.disk);
        for one in &image.partitions {
            let now = table.by_label(&one.label).expect("still there");
            assert_eq!((now.first, now.last), (one.first, one.last), "nothing moves");
            assert_eq!(now.id == one.id, one.label == "esp", "{}", one.label);
        }
        assert_eq!(table.for_first_boot(LARGE, counter()), Ok(None), "once is enough");
    }

    #[test]
    fn power_may_go_between_any_two_writes_of_the_first_boot() {
        let image = Table::of_image("1.0");
        let before = image.writes().expect("fits");
        let after = image.for_first_boot(LARGE, counter()).expect("fits").expect("is new");
        let writes = after.writes().expect("fits");
        let all: Vec<_> = writes.backup.iter().chain(&writes.primary).cloned().collect();
        for done in 0..=all.len() {
            let mut disk = Disk::new(LARGE);
            disk.write(&before.primary);
            disk.write(&all[..done]);
            let (table, origin) = disk.read().expect("one of the two is whole");
            let first_boot_again = table.for_first_boot(LARGE, counter()).expect("fits");
            match done {
                0..=2 => assert!(first_boot_again.is_some(), "after {done} writes"),
                // Entries changed under the old header: the copy is the one that counts.
                3 => assert_eq!((first_boot_again, origin), (None, Origin::Backup)),
                _ => assert_eq!((table, origin), (after.clone(), Origin::Primary)),
            }
        }
    }

    #[test]
    fn small_and_foreign_disks_are_refused() {
        let image = Table::of_image("1.0");
        let small = DISK_BYTES_MIN / SECTOR - 1;
        let error = image.for_first_boot(small, counter()).expect_err("too small");
        assert!(matches!(error, GptError::TooSmall { .. }), "{error}");
        assert!(image.for_first_boot(DISK_BYTES_MIN / SECTOR, counter()).is_ok());
        const { assert!(DISK_BYTES_MIN < 2_000_000_000, "a disk of 2 GB is enough") };

        let mut foreign = image.clone();
        let first = IMAGE_BYTES / SECTOR + SECTORS_PER_MIB;
        foreign.partitions.push(Partition {
            number: 7,
            kind: Part::CONFIG.kind(),
            id: Guid::derive(&["x"]),
            first,
            last: first + 10,
            attributes: 0,
            label: "photos".into(),
        });
        let error = foreign.for_first_boot(LARGE, counter()).expect_err("in the way").to_string();
        assert_eq!(error, "partition 7 (`photos`) is in the way of `root-b`");
        foreign.partitions.retain(|one| one.label != "root-a");
        let error = foreign.for_first_boot(LARGE, counter()).expect_err("is not ours");
        assert_eq!(error, GptError::Missing("root-a"));
    }

    #[test]
    fn what_a_table_cannot_hold_is_refused() {
        let mut table = Table::of_image("1.0");
        table.partitions[0].label = "x".repeat(37);
        assert!(table.writes().is_err());
        table.partitions[0].label = "x".repeat(36);
        assert!(table.writes().is_ok());
        table.partitions[0].number = 0;
        assert!(table.writes().is_err());
        table.partitions[0].number = 1;
        table.partitions[0].last = table.sectors;
        assert!(table.writes().is_err());
    }

    #[test]
    fn changed_bytes_are_noticed_and_never_panic() {
        let table = Table::of_image("1.0");
        let mut whole = Disk::new(table.sectors);
        let writes = table.writes().expect("fits");
        whole.write(&writes.primary);
        let mut word = 0x9e37_79b9_u32;
        for _ in 0..400 {
            word = word.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
            // The header and the entries that are in use.
            let at = 512 + (word >> 8) as usize % 1024;
            let mut disk =
                Disk { head: whole.head.clone(), tail: whole.tail.clone(), sectors: whole.sectors };
            disk.head[at] ^= 1 << (word & 7);
            let reserved = 512 + HEADER_BYTES..1024;
            assert_eq!(disk.read().is_ok(), reserved.contains(&at), "byte {at}");
        }
        for length in [0, 1, 511, 512, 1024, HEAD_BYTES - 1] {
            assert!(Table::decode(&whole.head[..length], &[], table.sectors).is_err());
        }
        assert!(Table::decode(&whole.head, &whole.tail, 0).is_err());
        assert!(Table::decode(&whole.head, &whole.tail, 1).is_err());
    }

    #[test]
    fn entries_with_right_checksums_and_wrong_places_are_refused() {
        let mut table = Table::of_image("1.0");
        table.partitions[1].first = table.partitions[0].first;
        let mut disk = Disk::new(table.sectors);
        disk.write(&table.writes().expect("the writer does not look for overlaps").primary);
        assert_eq!(
            disk.read(),
            Err(GptError::None { head: Fault::Extent, tail: Fault::Signature })
        );
    }
}
