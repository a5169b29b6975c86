//! Which version of the system the machine starts: the loader's counter, and the firmware's own entries.
//!
//! A version's file on the ESP is `skerry_V+LEFT-DONE.efi` until it has proved itself: the loader renames it at each
//! start, and passes over one that has no tries left as long as there is another. [`bless`] takes the counter away when
//! the machine is healthy, and sees to two entries at the front of the firmware's order: `Skerry`, the loader, and
//! `Skerry last good`, the version itself. The second is what the firmware starts when the loader gives up, which it
//! does at a file with a good header and a bad body. [`passed_over`] says which newer version was not started.
//!
//! Called by the second stage. Machines that were started without firmware have no variables, and nothing is done.
//!
//! Source: the Boot Loader Specification of the UAPI group, "Boot counting"; systemd's boot loader interface
//! (`LoaderBootCountPath`, `LoaderEntries`); UEFI 2.10, sections 3.1.3 (load options) and 10.3.5 (media device paths).

use crate::disk;
use crate::gpt::{Part, Partition};
use crate::kernel::{Kernel, Mount, NODEV, NOEXEC, NOSUID, RDONLY, REMOUNT};
use crate::modules::Modules;
use std::io;

/// Tries that a new version has; the builder writes them into the name of its file.
pub const TRIES: u32 = 3;
/// Folder of the versions on the ESP.
pub const FOLDER: &str = "EFI/Linux";
/// Where the ESP is mounted while it is looked at or changed.
pub const MOUNT_POINT: &str = "/efi";
const VARIABLES: &str = "/sys/firmware/efi/efivars";
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const LOADER: &str = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// Kept without power, seen by the firmware's own programs and by the system.
const ATTRIBUTES: [u8; 4] = [7, 0, 0, 0];
/// Longest variable that is read.
const VARIABLE_LEN_MAX: usize = 64 * 1024;
/// Entries of the firmware that are looked at.
const ENTRIES_MAX: usize = 256;
/// The entry is tried when its turn comes.
const ACTIVE: u32 = 1;

/// What [`bless`] has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Blessed {
    /// The counter was taken away just now.
    pub counter: bool,
    /// The firmware's entries were written.
    pub entries: bool,
}

/// Why a version was not marked as good.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlessError {
    /// The boot disk is not there any more, or has no ESP.
    #[error("the boot disk has no ESP")]
    NoEsp,
    /// The file on the ESP could not be renamed.
    #[error("the version's file on the ESP could not be renamed")]
    Rename(#[source] io::Error),
    /// The firmware did not take its entries.
    #[error("the firmware did not take its boot entries")]
    Entries(#[source] io::Error),
}

/// The name of a version's file.
pub fn file_name(version: &str, tries: Option<u32>) -> String {
    match tries {
        Some(tries) => format!("skerry_{version}+{tries}.efi"),
        None => format!("skerry_{version}.efi"),
    }
}

/// Marks the running version as good, on the disk with this name. Does nothing on a machine without firmware variables.
///
/// # Errors
///
/// [`BlessError`]; the version runs on, and the next boot tries again.
pub fn bless(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    disk: &str,
    version: &str,
) -> Result<Blessed, BlessError> {
    let mut blessed = Blessed::default();
    if !kernel.exists(VARIABLES) || disk::loader_partition(kernel).is_none() {
        return Ok(blessed);
    }
    let (_, disks) = disk::look(kernel);
    let disk = disks.into_iter().find(|one| one.name == disk).ok_or(BlessError::NoEsp)?;
    let esp = disk.table.by_label(Part::ESP.label).ok_or(BlessError::NoEsp)?;
    let device = format!("/dev/{}", disk.partition(Part::ESP.label).ok_or(BlessError::NoEsp)?);
    // The variable may name another version: the loader has tried that one before the firmware came to this.
    if counted(kernel).is_some_and(|name| name.starts_with(&format!("skerry_{version}+"))) {
        blessed.counter = rename(kernel, modules, &device, version).map_err(BlessError::Rename)?;
    }
    blessed.entries = write_entries(kernel, esp, version).map_err(BlessError::Entries)?;
    Ok(blessed)
}

/// File name of the version that the loader has counted at this start.
fn counted(kernel: &dyn Kernel) -> Option<String> {
    let path = text_variable(kernel, "LoaderBootCountPath")?;
    path.rsplit(['\\', '/']).next().map(str::to_owned)
}

fn text_variable(kernel: &dyn Kernel, name: &str) -> Option<String> {
    let bytes = kernel.read(&format!("{VARIABLES}/{name}-{LOADER}"), VARIABLE_LEN_MAX).ok()?;
    let text = decode(bytes.get(ATTRIBUTES.len()..)?);
    Some(text.trim_end_matches('\0').to_owned())
}

fn rename(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    device: &str,
    version: &str,
) -> io::Result<bool> {
    mount(kernel, modules, device, true)?;
    let folder = format!("{MOUNT_POINT}/{FOLDER}");
    let good = file_name(version, None);
    let renamed = kernel.list(&folder).and_then(|names| {
        let counted = format!("skerry_{version}+");
        let Some(name) = names.iter().find(|name| name.starts_with(&counted)) else {
            return Ok(false);
        };
        // FAT has no rename over a file that is there; a file of this name would be the same version.
        if names.contains(&good) {
            return Ok(false);
        }
        kernel.rename(&format!("{folder}/{name}"), &format!("{folder}/{good}")).map(|()| true)
    });
    let closed = close(kernel, device);
    let renamed = renamed?;
    closed.map(|()| renamed)
}

/// Unmounts the ESP after it was written. FAT has no journal: what was written is on the disk only when the disk itself
/// was told to flush.
///
/// # Errors
///
/// What the system says.
pub fn close(kernel: &dyn Kernel, device: &str) -> io::Result<()> {
    kernel.sync();
    kernel.unmount(MOUNT_POINT, false)?;
    kernel.flush(device)
}

/// Mounts the ESP; end it with [`close`], or by unmounting when it was only read.
///
/// # Errors
///
/// What the system says.
pub fn mount(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    device: &str,
    writable: bool,
) -> io::Result<()> {
    if let Some(modules) = modules {
        for name in ["vfat", "nls_cp437", "nls_ascii"] {
            let _ = modules.load(name); // the mount fails with a better word
        }
    }
    let flags = NOSUID | NODEV | NOEXEC | if writable { 0 } else { RDONLY };
    // A power cut in a rename may leave two names for one file. To remove one of them is an error of the filesystem, at
    // which it must not become read-only in the middle of an update.
    let data = "umask=0077,iocharset=ascii,errors=continue";
    kernel.mount(&Mount::new(device, MOUNT_POINT, "vfat", flags, data))
}

/// Whether the machine was started by the loader of its own disk, which counts tries.
pub fn has_loader(kernel: &dyn Kernel) -> bool {
    kernel.exists(VARIABLES) && disk::loader_partition(kernel).is_some()
}

/// Whether the firmware starts only what is signed.
pub fn is_secure(kernel: &dyn Kernel) -> bool {
    let bytes = kernel.read(&format!("{VARIABLES}/SecureBoot-{GLOBAL}"), VARIABLE_LEN_MAX);
    bytes.is_ok_and(|bytes| bytes.get(ATTRIBUTES.len()) == Some(&1))
}

/// The ESP of a disk, and its node.
pub fn esp(kernel: &dyn Kernel, disk: &str) -> Option<(Partition, String)> {
    let (_, disks) = disk::look(kernel);
    let disk = disks.into_iter().find(|one| one.name == disk)?;
    let esp = disk.table.by_label(Part::ESP.label)?.clone();
    Some((esp, format!("/dev/{}", disk.partition(Part::ESP.label)?)))
}

/// Takes the counter out of the name of a version's file; `false` when there was none.
///
/// # Errors
///
/// [`BlessError`].
pub fn take_counter(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    disk: &str,
    version: &str,
) -> Result<bool, BlessError> {
    let (_, device) = esp(kernel, disk).ok_or(BlessError::NoEsp)?;
    rename(kernel, modules, &device, version).map_err(BlessError::Rename)
}

/// Has the firmware's second entry name this version.
///
/// # Errors
///
/// [`BlessError`].
pub fn name_last_good(kernel: &dyn Kernel, disk: &str, version: &str) -> Result<bool, BlessError> {
    let (esp, _) = esp(kernel, disk).ok_or(BlessError::NoEsp)?;
    write_entries(kernel, &esp, version).map_err(BlessError::Entries)
}

/// Has the loader start a version once, at the next start.
///
/// # Errors
///
/// What the firmware says.
pub fn start_once(kernel: &dyn Kernel, version: &str) -> io::Result<()> {
    let bytes = [&ATTRIBUTES[..], &encode(&file_name(version, None))].concat();
    write_variables(kernel, &[(format!("LoaderEntryOneShot-{LOADER}"), bytes)])
}

/// Versions that the loader has seen at this start.
pub fn seen_versions(kernel: &dyn Kernel) -> Vec<String> {
    let entries = text_variable(kernel, "LoaderEntries").unwrap_or_default();
    let version = |id: &str| Some(id.strip_prefix("skerry_")?.strip_suffix(".efi")?.to_owned());
    entries.split('\0').filter_map(version).collect()
}

/// A newer version that has no tries left, so that this one was started in its place. Mounts the ESP only when the
/// loader has seen more than one version.
pub fn passed_over(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    disk: &str,
    version: &str,
) -> Option<String> {
    let entries = text_variable(kernel, "LoaderEntries")?;
    if entries.split('\0').filter(|id| id.starts_with("skerry_")).count() < 2 {
        return None;
    }
    let (_, disks) = disk::look(kernel);
    let esp = disks.iter().find(|one| one.name == disk)?.partition(Part::ESP.label)?;
    mount(kernel, modules, &format!("/dev/{esp}"), false).ok()?;
    let names = kernel.list(&format!("{MOUNT_POINT}/{FOLDER}"));
    let _ = kernel.unmount(MOUNT_POINT, false);
    names.ok()?.iter().find_map(|name| {
        let rest = name.strip_prefix("skerry_")?.strip_suffix(".efi")?;
        let (other, counter) = rest.rsplit_once('+')?;
        let left = counter.split('-').next()?;
        (left == "0" && other != version).then(|| other.to_owned())
    })
}

/// Sees to the two entries and to their places; returns whether anything was written.
fn write_entries(kernel: &dyn Kernel, esp: &Partition, version: &str) -> io::Result<bool> {
    let removable = match kernel.uname().1.as_str() {
        "aarch64" => "BOOTAA64.EFI",
        _ => "BOOTX64.EFI",
    };
    let good = file_name(version, None);
    let wanted = [
        load_option("Skerry", esp, &format!("\\EFI\\BOOT\\{removable}")),
        load_option("Skerry last good", esp, &format!("\\EFI\\Linux\\{good}")),
    ];
    let mut known = Vec::new();
    for name in kernel.list(VARIABLES)?.into_iter().take(ENTRIES_MAX) {
        let number = name.strip_prefix("Boot").and_then(|rest| rest.strip_suffix(GLOBAL));
        let number = number.and_then(|rest| u16::from_str_radix(rest.strip_suffix('-')?, 16).ok());
        if let Some(number) = number {
            let bytes = kernel.read(&format!("{VARIABLES}/{name}"), VARIABLE_LEN_MAX);
            known.push((number, bytes.unwrap_or_default()));
        }
    }
    let mut changes = Vec::new();
    let mut front = Vec::new();
    for option in wanted {
        let number = known.iter().find(|(_, bytes)| {
            bytes.get(ATTRIBUTES.len()..).is_some_and(|one| title(one) == title(&option))
        });
        let bytes = [&ATTRIBUTES[..], &option].concat();
        let number = match number {
            Some((number, old)) => {
                if *old != bytes {
                    changes.push((format!("Boot{number:04X}"), bytes));
                }
                *number
            }
            None => {
                let free = |number: &u16| known.iter().all(|(used, _)| used != number);
                let number = (0..u16::MAX).find(free).expect("fewer entries than numbers");
                known.push((number, bytes.clone()));
                changes.push((format!("Boot{number:04X}"), bytes));
                number
            }
        };
        front.push(number);
    }
    let old = kernel.read(&format!("{VARIABLES}/BootOrder-{GLOBAL}"), VARIABLE_LEN_MAX);
    let old = old.unwrap_or_default();
    let rest = old.get(ATTRIBUTES.len()..).unwrap_or_default().chunks_exact(2);
    let rest = rest.map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let order: Vec<u16> =
        front.iter().copied().chain(rest.filter(|number| !front.contains(number))).collect();
    let order = order.into_iter().flat_map(u16::to_le_bytes);
    let order: Vec<u8> = ATTRIBUTES.into_iter().chain(order).collect();
    if order != old {
        changes.push(("BootOrder".into(), order));
    }
    if changes.is_empty() {
        return Ok(false);
    }
    let changes: Vec<_> =
        changes.into_iter().map(|(name, bytes)| (format!("{name}-{GLOBAL}"), bytes)).collect();
    write_variables(kernel, &changes).map(|()| true)
}

/// Writes variables, whole names; they cannot be written otherwise.
fn write_variables(kernel: &dyn Kernel, changes: &[(String, Vec<u8>)]) -> io::Result<()> {
    let remount = |flags| {
        let flags = NOSUID | NODEV | NOEXEC | REMOUNT | flags;
        Mount::new("efivarfs", VARIABLES, "efivarfs", flags, "")
    };
    kernel.mount(&remount(0))?;
    let written = changes
        .iter()
        .try_for_each(|(name, bytes)| kernel.write_variable(&format!("{VARIABLES}/{name}"), bytes));
    let closed = kernel.mount(&remount(RDONLY));
    written.and(closed)
}

/// `EFI_LOAD_OPTION`: an entry of the firmware's menu for a file on the ESP.
fn load_option(title: &str, esp: &Partition, path: &str) -> Vec<u8> {
    const MEDIA: u8 = 4;
    const HARD_DRIVE: u8 = 1;
    const FILE_PATH: u8 = 4;
    const GPT: u8 = 2;
    const SIGNATURE_IS_GUID: u8 = 2;
    const END: [u8; 4] = [0x7f, 0xff, 4, 0];
    let node = |kind: u8, body: &[u8]| {
        let len = u16::try_from(body.len() + 4).expect("paths of ours are short");
        [&[MEDIA, kind][..], &len.to_le_bytes(), body].concat()
    };
    let number = u32::try_from(esp.number).expect("a table has 128 entries");
    let drive = [
        &number.to_le_bytes()[..],
        &(esp.offset() / crate::gpt::SECTOR).to_le_bytes(),
        &(esp.bytes() / crate::gpt::SECTOR).to_le_bytes(),
        &esp.id.0,
        &[GPT, SIGNATURE_IS_GUID],
    ];
    let devices =
        [node(HARD_DRIVE, &drive.concat()), node(FILE_PATH, &encode(path)), END.to_vec()].concat();
    let len = u16::try_from(devices.len()).expect("two short nodes");
    [&ACTIVE.to_le_bytes()[..], &len.to_le_bytes(), &encode(title), &devices].concat()
}

/// What an entry is called.
fn title(option: &[u8]) -> Option<String> {
    const TITLE_AT: usize = 6;
    decode(option.get(TITLE_AT..)?).split('\0').next().map(str::to_owned)
}

/// UTF-16 with its end.
fn encode(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

fn decode(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    fn variable(name: &str, vendor: &str) -> String {
        format!("{VARIABLES}/{name}-{vendor}")
    }

    /// A machine that was started by firmware and loader, with version 2 counted.
    fn machine(counted: &str) -> Machine {
        let machine = Machine::new();
        machine.flash("vda", 4 << 30);
        let (_, disks) = disk::look(&machine);
        let esp = disks[0].table.by_label("esp").expect("has one").id;
        let text = |text: &str| [&[6, 0, 0, 0][..], &encode(text)].concat();
        machine.file(disk::LOADER_VARIABLE, &text(&esp.to_string()));
        let path = format!("\\EFI\\Linux\\{counted}");
        machine.file(&variable("LoaderBootCountPath", LOADER), &text(&path));
        machine.file(&variable("LoaderEntries", LOADER), &text("skerry_2.efi\0skerry_1.efi\0"));
        machine.file(&variable("BootOrder", GLOBAL), &[7, 0, 0, 0, 0, 0, 3, 0]);
        machine.file(&variable("Boot0000", GLOBAL), &text("xxxSetup"));
        machine.file(&variable("Boot0003", GLOBAL), &text("xxxDVD"));
        machine.volume("/dev/vda1", &format!("{FOLDER}/{counted}"), b"uki");
        machine.clear_log();
        machine
    }

    fn bytes(machine: &Machine, name: &str) -> Vec<u8> {
        machine.read(&variable(name, GLOBAL), VARIABLE_LEN_MAX).expect("there")
    }

    #[test]
    fn healthy_version_loses_its_counter_and_becomes_the_last_good_one() {
        let machine = machine("skerry_2+2-1.efi");
        let done = bless(&machine, None, "vda", "2").expect("blessed");
        assert_eq!(done, Blessed { counter: true, entries: true });
        let file = |name: &str| machine.in_volume("/dev/vda1", &format!("{FOLDER}/{name}"));
        assert_eq!(file("skerry_2.efi").as_deref(), Some(&b"uki"[..]));
        assert_eq!(file("skerry_2+2-1.efi"), None);
        assert_eq!(bytes(&machine, "BootOrder"), [7, 0, 0, 0, 1, 0, 2, 0, 0, 0, 3, 0]);
        let last_good = bytes(&machine, "Boot0002");
        assert_eq!(title(&last_good[4..]).as_deref(), Some("Skerry last good"));
        let path = encode("\\EFI\\Linux\\skerry_2.efi");
        assert!(last_good.windows(path.len()).any(|part| part == path));
        let log = machine.log();
        let at = |line: &str| log.iter().position(|one| one.starts_with(line)).expect(line);
        assert!(at("mount /dev/vda1 /efi vfat rw") < at("unmount /efi"), "{log:?}");
        assert!(
            log.last().expect("a line").contains("remount efivarfs") && !machine.exists("/efi/EFI")
        );

        // The second time there is nothing to do, and the flash of the firmware is left alone.
        machine.clear_log();
        machine.remove_file(&variable("LoaderBootCountPath", LOADER));
        assert_eq!(bless(&machine, None, "vda", "2").expect("blessed"), Blessed::default());
        assert!(machine.log_of("mount").is_empty() && machine.log_of("write").is_empty());
        // A newer one takes over the same entries.
        let done = bless(&machine, None, "vda", "3").expect("blessed");
        assert_eq!(done, Blessed { counter: false, entries: true });
        assert_eq!(machine.log_of("write_variable").len(), 1);
    }

    #[test]
    fn hard_drive_path_is_as_the_firmware_writes_it() {
        let machine = Machine::new();
        machine.flash("vda", 4 << 30);
        let (_, disks) = disk::look(&machine);
        let esp = disks[0].table.by_label("esp").expect("has one");
        let option = load_option("A", esp, "\\B");
        let mut wanted = vec![1, 0, 0, 0, 42 + 4 + 6 + 4, 0, b'A', 0, 0, 0];
        wanted.extend([4, 1, 42, 0, 1, 0, 0, 0]);
        wanted.extend(2048_u64.to_le_bytes());
        wanted.extend(((128_u64 << 20) / 512).to_le_bytes());
        wanted.extend(esp.id.0);
        wanted.extend([2, 2, 4, 4, 10, 0, b'\\', 0, b'B', 0, 0, 0, 0x7f, 0xff, 4, 0]);
        assert_eq!(option, wanted);
    }

    #[test]
    fn counter_of_another_version_is_left_alone_and_that_version_is_named() {
        let machine = machine("skerry_3+0-3.efi");
        machine.volume("/dev/vda1", &format!("{FOLDER}/skerry_2.efi"), b"uki");
        let done = bless(&machine, None, "vda", "2").expect("blessed");
        assert!(!done.counter && done.entries);
        assert!(machine.in_volume("/dev/vda1", &format!("{FOLDER}/skerry_3+0-3.efi")).is_some());
        assert_eq!(passed_over(&machine, None, "vda", "2").as_deref(), Some("3"));
        assert_eq!(passed_over(&machine, None, "vda", "3"), None);
    }

    #[test]
    fn machine_without_firmware_is_left_alone_and_failures_are_told() {
        let machine = Machine::new();
        machine.flash("vda", 4 << 30);
        assert_eq!(bless(&machine, None, "vda", "2").expect("nothing"), Blessed::default());

        let machine = self::machine("skerry_2+2-1.efi");
        machine.fail("mount /dev/vda1", 5);
        let error = bless(&machine, None, "vda", "2").expect_err("no ESP");
        assert!(matches!(error, BlessError::Rename(_)), "{error}");
        machine.heal();
        machine.fail("write_variable", 28);
        let error = bless(&machine, None, "vda", "2").expect_err("full");
        assert!(matches!(error, BlessError::Entries(_)), "{error}");
        assert_eq!(
            machine.log().last().map(String::as_str).map(|line| line.contains(" ro")),
            Some(true)
        );
        assert!(matches!(bless(&machine, None, "sda", "2"), Err(BlessError::NoEsp)));
    }
}
