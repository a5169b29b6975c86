//! Which disk the machine was started from, and its partitions at the first boot.
//!
//! Deciding is apart from looking: [`look`] gathers what the disks have, [`choose`] says which one it is. Called by the
//! first stage, before any partition is in use.
//!
//! Source of the variable: the boot loader interface of systemd, `LoaderDevicePartUUID`.

use crate::gpt::{GptError, Guid, HEAD_BYTES, Origin, Part, SECTOR, TAIL_BYTES, Table};
use crate::kernel::{Kernel, line};
use std::io;

/// The loader's word for the partition that it was read from.
pub const LOADER_VARIABLE: &str =
    "/sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// Disks that are looked at.
const DISKS_MAX: usize = 64;
/// Block devices that are no disks.
const NOT_DISKS: [&str; 9] = ["loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd", "mtd"];

/// A disk with a table of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// `vda`, `nvme0n1`, `mmcblk0`.
    pub name: String,
    /// Its table.
    pub table: Table,
    /// Where the table was read from.
    pub origin: Origin,
    /// Sectors of 512 bytes that it has.
    pub sectors: u64,
}

impl Disk {
    /// Node of the disk.
    pub fn device(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// Name of the partition with this label, `vda3`.
    pub fn partition(&self, label: &str) -> Option<String> {
        let number = self.table.by_label(label)?.number;
        let between = if self.name.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
        Some(format!("{}{between}{number}", self.name))
    }
}

/// Why there is no boot disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// None with our labels.
    #[error("no disk of this machine has the appliance on it ({looked_at})")]
    None {
        /// What was looked at.
        looked_at: String,
    },
    /// More than one, and nothing says which.
    #[error("more than one disk has the appliance on it: {}", .0.join(", "))]
    Several(Vec<String>),
    /// The loader's disk is not there.
    #[error("the disk that the firmware has started from is not there (partition {0})")]
    Gone(Guid),
}

impl DiskError {
    /// What a person can do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::None { .. } => {
                "check that the disk is plugged in and that its controller is one of the supported ones"
            }
            Self::Several(_) => {
                "unplug all but one, for example the stick that the disk was flashed from"
            }
            Self::Gone(_) => "check that the disk is plugged in",
        }
    }
}

/// Every disk, and those of them that have our labels.
pub fn look(kernel: &dyn Kernel) -> (Vec<String>, Vec<Disk>) {
    let names = kernel.list("/sys/class/block").unwrap_or_default();
    let is_disk = |name: &String| {
        !NOT_DISKS.iter().any(|prefix| name.starts_with(prefix))
            && !kernel.exists(&format!("/sys/class/block/{name}/partition"))
    };
    let names: Vec<_> = names.into_iter().filter(is_disk).take(DISKS_MAX).collect();
    let ours = names.iter().filter_map(|name| read(kernel, name).ok().flatten()).collect();
    (names, ours)
}

/// Reads the table of one disk; `None` when it is not ours.
fn read(kernel: &dyn Kernel, name: &str) -> io::Result<Option<Disk>> {
    let device = format!("/dev/{name}");
    let block = line(kernel, &format!("/sys/class/block/{name}/queue/logical_block_size"));
    if !matches!(block.as_str(), "" | "512") {
        return Ok(None);
    }
    let len = kernel.device_len(&device)?;
    let sectors = len / SECTOR;
    if len < (HEAD_BYTES + TAIL_BYTES) as u64 {
        return Ok(None);
    }
    let head = kernel.read_at(&device, 0, HEAD_BYTES)?;
    // A table that says it is longer than the disk is refused by the codec.
    let tail = kernel.read_at(&device, sectors * SECTOR - TAIL_BYTES as u64, TAIL_BYTES)?;
    let Ok((table, origin)) = Table::decode(&head, &tail, sectors) else { return Ok(None) };
    let ours = [Part::ESP, Part::ROOT_A].iter().all(|part| table.by_label(part.label).is_some());
    Ok(ours.then(|| Disk { name: name.to_owned(), table, origin, sectors }))
}

/// The partition that the loader was read from; `None` without EFI.
pub fn loader_partition(kernel: &dyn Kernel) -> Option<Guid> {
    const LEN_MAX: usize = 256;
    let bytes = kernel.read(LOADER_VARIABLE, LEN_MAX).ok()?;
    // Four bytes of attributes, then UTF-16.
    let units = bytes.get(4..)?.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let text: String = char::decode_utf16(units).filter_map(Result::ok).collect();
    Guid::parse(text.trim_end_matches('\0'))
}

/// Which disk it is.
///
/// With the loader's word only the disk with that ESP; two disks flashed from one file have the same one, so that even
/// then there may be several. Without it exactly one disk may have the labels.
///
/// # Errors
///
/// [`DiskError`], in words for the console.
pub fn choose(
    names: &[String],
    mut disks: Vec<Disk>,
    loader: Option<Guid>,
) -> Result<Disk, DiskError> {
    if let Some(loader) = loader {
        let started =
            |disk: &Disk| disk.table.by_label(Part::ESP.label).is_some_and(|esp| esp.id == loader);
        let found = !disks.is_empty();
        disks.retain(started);
        if disks.is_empty() && found {
            return Err(DiskError::Gone(loader));
        }
    }
    match disks.len() {
        0 => Err(DiskError::None {
            looked_at: match names.is_empty() {
                true => "there is no disk at all".into(),
                false => format!("looked at {}", names.join(", ")),
            },
        }),
        1 => Ok(disks.remove(0)),
        _ => Err(DiskError::Several(disks.into_iter().map(|disk| disk.name).collect())),
    }
}

/// What was done to the table of the boot disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prepared {
    /// Nothing was to be done.
    AsItWas,
    /// The one at the start was broken and was written again from the copy.
    Repaired,
    /// First boot: `root-b` and `state` were added.
    Extended,
}

/// Why the table of the boot disk could not be completed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// The layout does not fit the disk.
    #[error("the partitions of disk `{disk}` could not be completed")]
    Layout {
        /// Which disk.
        disk: String,
        /// Why.
        source: GptError,
    },
    /// The disk did not take it.
    #[error("could not write the partition table of disk `{disk}`")]
    Write {
        /// Which disk.
        disk: String,
        /// What the system said.
        source: io::Error,
    },
}

impl PrepareError {
    /// What a person can do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Layout { source: GptError::TooSmall { .. }, .. } => {
                "use a disk of at least 2 GB; nothing can be kept on this one"
            }
            Self::Layout { .. } => "flash the disk again; what is on it was not touched",
            Self::Write { .. } => "the medium may be write-protected or worn out; use another one",
        }
    }
}

/// Completes the table at the first boot and repairs a broken one. The copy at the end is written and durable before
/// the table at the start is begun, so that one of them is whole at any time.
///
/// # Errors
///
/// [`PrepareError`]; the disk is as it was then, or the step is repeated at the next boot.
pub fn prepare(kernel: &dyn Kernel, disk: &mut Disk) -> Result<Prepared, PrepareError> {
    let layout = |source| PrepareError::Layout { disk: disk.name.clone(), source };
    let random = || kernel.random(16).try_into().expect("as many as asked for");
    let next = disk.table.for_first_boot(disk.sectors, random).map_err(layout)?;
    let prepared = match (&next, disk.origin) {
        (Some(_), _) => Prepared::Extended,
        (None, Origin::Backup) => Prepared::Repaired,
        (None, _) => return Ok(Prepared::AsItWas),
    };
    let known: Vec<_> = disk.table.partitions.iter().map(|one| one.number).collect();
    let table = next.unwrap_or_else(|| disk.table.clone());
    let writes = table.writes().map_err(layout)?;
    let device = disk.device();
    for (offset, bytes) in writes.backup.iter().chain(&writes.primary) {
        kernel
            .write_at(&device, *offset, bytes)
            .map_err(|source| PrepareError::Write { disk: disk.name.clone(), source })?;
    }
    // Nothing of the disk is in use yet, so the kernel usually takes all of it; else it is told of what is new.
    if kernel.reread_partitions(&device).is_err() {
        for one in table.partitions.iter().filter(|one| !known.contains(&one.number)) {
            let number = u32::try_from(one.number).expect("at most 128");
            kernel
                .add_partition(&device, number, one.offset(), one.bytes())
                .map_err(|source| PrepareError::Write { disk: disk.name.clone(), source })?;
        }
    }
    disk.table = table;
    disk.origin = Origin::Primary;
    Ok(prepared)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    const GIB: u64 = 1 << 30;

    #[test]
    fn first_boot_adds_root_b_and_state_copy_first_and_renames_all_but_the_esp() {
        let machine = Machine::new();
        machine.flash("vda", 4 * GIB);
        let (_, disks) = look(&machine);
        let mut disk = choose(&[], disks, None).expect("one disk");
        let before = disk.table.clone();
        assert_eq!(prepare(&machine, &mut disk).expect("fits"), Prepared::Extended);
        let writes = machine.log_of("write_at /dev/vda");
        assert_eq!(writes.len(), 5, "{writes:?}");
        let offset = |text: &String| -> u64 {
            text.split_whitespace().nth(2).and_then(|word| word.parse().ok()).expect("an offset")
        };
        assert!(offset(&writes[0]) > 3 * GIB && offset(&writes[1]) > 3 * GIB);
        assert!(writes[2..].iter().all(|write| offset(write) < 1 << 20));
        assert_eq!(machine.log_of("reread").len(), 1);
        assert!(machine.log_of("add_partition").is_empty());

        let (_, disks) = look(&machine);
        let after = choose(&[], disks, None).expect("still one").table;
        assert_eq!(after.by_label("esp"), before.by_label("esp"));
        assert_ne!(after.disk, before.disk);
        assert_ne!(after.by_label("config"), before.by_label("config"));
        assert!(after.by_label("state").expect("new").bytes() > 3 * GIB);
        let mut again = Disk { table: after, ..disk };
        assert_eq!(prepare(&machine, &mut again).expect("done"), Prepared::AsItWas);
    }

    #[test]
    fn power_cut_after_any_write_leaves_a_table_and_the_next_boot_completes_it() {
        for cut in 0..5 {
            let machine = Machine::new();
            machine.flash("vda", 4 * GIB);
            machine.fail_after("write_at /dev/vda", cut, 5);
            let (_, disks) = look(&machine);
            let mut disk = choose(&[], disks, None).expect("one disk");
            prepare(&machine, &mut disk).expect_err("cut");
            machine.heal();
            let (names, disks) = look(&machine);
            let mut disk = choose(&names, disks, None).expect("a table is whole at any time");
            prepare(&machine, &mut disk).expect("completed");
            let (names, disks) = look(&machine);
            let disk = choose(&names, disks, None).expect("complete");
            assert!(disk.table.by_label("state").is_some(), "after {cut} writes");
        }
    }

    #[test]
    fn partitions_in_use_are_added_one_by_one() {
        let machine = Machine::new();
        machine.flash("nvme0n1", 4 * GIB);
        machine.fail("reread", 16);
        let (_, disks) = look(&machine);
        let mut disk = choose(&[], disks, None).expect("one disk");
        prepare(&machine, &mut disk).expect("fits");
        assert_eq!(machine.log_of("add_partition").len(), 2);
        assert_eq!(disk.partition("state").as_deref(), Some("nvme0n1p5"));
    }

    #[test]
    fn small_disk_and_disk_that_cannot_be_written_say_so() {
        let machine = Machine::new();
        machine.flash("vda", GIB);
        let (_, disks) = look(&machine);
        let mut disk = choose(&[], disks, None).expect("one disk");
        let error = prepare(&machine, &mut disk).expect_err("too small");
        assert!(error.hint().contains("2 GB"), "{error}");
        assert!(machine.log_of("write_at").is_empty());

        let machine = Machine::new();
        machine.flash("vda", 4 * GIB);
        machine.fail("write_at", 30);
        let (_, disks) = look(&machine);
        let mut disk = choose(&[], disks, None).expect("one disk");
        let error = prepare(&machine, &mut disk).expect_err("read-only");
        assert!(error.hint().contains("write-protected"), "{error}");
    }

    #[test]
    fn two_disks_are_refused_unless_the_loader_says_which() {
        let machine = Machine::new();
        machine.flash("sda", 4 * GIB);
        machine.flash("vda", 4 * GIB);
        let (names, disks) = look(&machine);
        let two = choose(&names, disks.clone(), None);
        assert_eq!(two, Err(DiskError::Several(vec!["sda".into(), "vda".into()])));
        let esp = disks[1].table.by_label("esp").expect("has one").id;
        // Flashed from the same file: the ESP says nothing.
        assert!(matches!(choose(&names, disks.clone(), Some(esp)), Err(DiskError::Several(_))));
        let mut other = disks.clone();
        let theirs = other[0].table.partitions.iter_mut().find(|one| one.label == "esp");
        theirs.expect("has one").id = Guid::derive(&["another"]);
        assert_eq!(choose(&names, other.clone(), Some(esp)).expect("one").name, "vda");
        let nowhere = Guid::derive(&["nowhere"]);
        assert_eq!(choose(&names, other, Some(nowhere)), Err(DiskError::Gone(nowhere)));
        let none = choose(&names, Vec::new(), None).expect_err("none");
        assert!(none.to_string().contains("looked at sda, vda"), "{none}");
    }

    #[test]
    fn loaders_variable_is_utf16_behind_its_attributes() {
        let machine = Machine::new();
        assert_eq!(loader_partition(&machine), None);
        let id = Guid::derive(&["esp"]);
        let mut bytes = vec![6, 0, 0, 0];
        format!("{id}\0").encode_utf16().for_each(|unit| bytes.extend(unit.to_le_bytes()));
        machine.file(LOADER_VARIABLE, &bytes);
        assert_eq!(loader_partition(&machine), Some(id));
        machine.file(LOADER_VARIABLE, &[6, 0]);
        assert_eq!(loader_partition(&machine), None);
    }
}
