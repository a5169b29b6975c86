//! QEMU's log of what a machine wrote to its disk, and what may be left of it when the power goes.
//!
//! The filter `blklogwrites` writes every write and every flush, in order, in the format of Linux's dm-log-writes.
//! [`WriteLog`] reads it; [`crash`] says which writes a disk may have at a point of it: all before the last flush, and any
//! part of those after it, the last sectors of one perhaps not.
//!
//! Source: Linux, drivers/md/dm-log-writes.c (superblock and entries); QEMU, block/blklogwrites.c.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a sector, of the disk and of the log.
pub const SECTOR: u64 = 512;
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// Something that a machine has asked of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Bytes at a place of the disk; where they are in the log.
    Write {
        /// Where on the disk.
        at: u64,
        /// How many.
        len: u64,
        /// Where in the log.
        data: u64,
        /// It is on the disk when it has ended.
        durable: bool,
    },
    /// Whatever was written before is on the disk.
    Flush,
}

/// A log that was read.
pub struct WriteLog {
    file: File,
    /// In the order of the machine.
    pub entries: Vec<Entry>,
}

impl WriteLog {
    /// Reads a log that QEMU has closed.
    ///
    /// # Errors
    ///
    /// It is none, or was cut.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("no log {}", path.display()))?;
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0).context("the log of writes is empty")?;
        let u64_at = |bytes: &[u8], at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
        };
        ensure!(u64_at(&head, 0) == MAGIC, "this is no log of writes");
        let sector = u32::from_le_bytes(head[24..28].try_into().expect("4 bytes"));
        ensure!(u64::from(sector) == SECTOR, "the log has sectors of {sector} bytes");
        let mut entries = Vec::new();
        let mut at = SECTOR;
        for _ in 0..u64_at(&head, 16) {
            let mut entry = [0; 32];
            file.read_exact_at(&mut entry, at).context("the log of writes is cut")?;
            let (place, count, flags) = (u64_at(&entry, 0), u64_at(&entry, 8), u64_at(&entry, 16));
            at += SECTOR;
            if flags & FLUSH != 0 {
                entries.push(Entry::Flush);
            }
            // What was given up keeps its bytes here, as on a disk that ignores it.
            if flags & DISCARD == 0 && count > 0 {
                let (len, durable) = (count * SECTOR, flags & FUA != 0);
                entries.push(Entry::Write { at: place * SECTOR, len, data: at, durable });
                at += len;
            }
        }
        Ok(Self { file, entries })
    }

    /// The bytes of a write.
    pub fn bytes(&self, data: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len)?];
        self.file.read_exact_at(&mut bytes, data)?;
        Ok(bytes)
    }
}

/// What is on the disk after a power cut.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Crash {
    /// So many entries from the start are on it for certain.
    pub durable: usize,
    /// Of the entries behind, those that are on it too, in this order, with how many bytes of each.
    pub also: Vec<(usize, u64)>,
}

/// A power cut after `end` entries. `random` gives any number; without it everything that was written is there.
pub fn crash(entries: &[Entry], end: usize, mut random: Option<&mut dyn FnMut() -> u64>) -> Crash {
    let flush = entries[..end].iter().rposition(|entry| *entry == Entry::Flush);
    let durable = flush.map_or(0, |at| at + 1);
    let mut also = Vec::new();
    // Mostly a little is lost, sometimes nearly all.
    let odds = random.as_mut().map_or(0, |next| [1, 8, 15][(next() % 3) as usize]);
    for (number, entry) in entries[..end].iter().enumerate().skip(durable) {
        let Entry::Write { len, durable, .. } = *entry else { continue };
        let Some(next) = random.as_mut() else {
            also.push((number, len));
            continue;
        };
        if durable || next() % 16 >= odds {
            let torn = !durable && next() % 8 == 0;
            let sectors = len / SECTOR;
            also.push((number, if torn { next() % (sectors + 1) * SECTOR } else { len }));
        }
    }
    Crash { durable, also }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(at: u64, len: u64) -> Entry {
        Entry::Write { at, len, data: 0, durable: false }
    }

    #[test]
    fn log_is_read_in_order_and_a_cut_one_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = vec![0; 512];
        log[..8].copy_from_slice(&MAGIC.to_le_bytes());
        log[16..24].copy_from_slice(&3_u64.to_le_bytes());
        log[24..28].copy_from_slice(&512_u32.to_le_bytes());
        let mut entry = |place: u64, count: u64, flags: u64, data: &[u8]| {
            let mut head = vec![0; 512];
            for (at, number) in [place, count, flags].into_iter().enumerate() {
                head[at * 8..at * 8 + 8].copy_from_slice(&number.to_le_bytes());
            }
            log.extend(head);
            log.extend(data);
        };
        entry(5, 2, 0, &[7; 1024]);
        entry(0, 0, FLUSH, &[]);
        entry(9, 1, FUA, &[8; 512]);
        std::fs::write(&path, &log).unwrap();
        let read = WriteLog::open(&path).unwrap();
        let wanted = [
            Entry::Write { at: 2560, len: 1024, data: 1024, durable: false },
            Entry::Flush,
            Entry::Write { at: 4608, len: 512, data: 3072, durable: true },
        ];
        assert_eq!(read.entries, wanted);
        assert_eq!(read.bytes(3072, 512).unwrap(), [8; 512]);
        std::fs::write(&path, &log[..2000]).unwrap();
        assert!(WriteLog::open(&path).is_err());
        std::fs::write(&path, "no log, but longer than its head").unwrap();
        assert!(WriteLog::open(&path).is_err());
    }

    #[test]
    fn what_was_flushed_is_there_and_of_the_rest_any_part() {
        let entries = [write(0, 512), Entry::Flush, write(1, 1024), write(2, 512), write(3, 4096)];
        let all = crash(&entries, 4, None);
        assert_eq!(all, Crash { durable: 2, also: vec![(2, 1024), (3, 512)] });
        let mut word = 1_u64;
        let mut next = || {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word >> 33
        };
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..2000 {
            let crash = crash(&entries, 5, Some(&mut next));
            assert_eq!(crash.durable, 2);
            for (number, len) in crash.also {
                let Entry::Write { len: all, .. } = entries[number] else { panic!("a write") };
                assert!(number >= 2 && len <= all && len.is_multiple_of(SECTOR));
                seen.insert((number, len == all));
            }
        }
        assert_eq!(seen.len(), 6, "each was there, and torn, at least once: {seen:?}");
    }
}
